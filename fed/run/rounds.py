"""``Rounds``: the rounds of a run, from wherever it is to the last, each written down when it is over."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ...engine.lm.evaluation import Evaluation, evaluate
from ..exchange import Exchange, serve
from ..ledger.file import LedgerWriter, RoundRecord
from ..ledger.snapshot import Snapshot
from ..server import RoundResult
from ..setup.server_and_clients import Federation
from ..terms import CALIBRATION
from .directory import SNAPSHOT, RunDirectory
from .metrics import Metrics
from .saved_rounds import SavedRounds

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run reports after each round (round 0: before training)."""

    round: int
    rounds: int
    loss: float | None
    accuracy: float | None
    bytes: int
    steps_per_second: float


Report = Callable[[Progress], None]


class Rounds:
    """The rounds of a run, each written down when it is over."""

    def __init__(
        self,
        federation: Federation,
        exchange: Exchange,
        directory: RunDirectory,
        ledger: LedgerWriter,
        metrics: Metrics,
        report: Report,
        log: Log,
    ) -> None:
        self._federation, self._directory, self._ledger, self._metrics = federation, directory, ledger, metrics
        self._exchange, self._report, self._log = exchange, report, log
        self._config, self._timing = federation.config, federation.timing
        self._begun, self._in_steps, self._in_forwards = time.perf_counter(), 0.0, 0.0

    def run(self, recorded: SavedRounds) -> None:
        """From wherever the run is to its last round."""
        self._restore(recorded)
        federation = self._federation
        before = self._metrics.before()
        if before is None:
            before = self._evaluate()
            if not federation.server.replica.terms.calibration_steps:
                self._write(None, before)
        for line in recorded.pending:
            self._close(federation.restore(line), before)
        self._snapshot(recorded)
        if federation.server.round == CALIBRATION:
            self._log(f"a path of {self._config.selection.steps} steps of every client, to find the extreme ones")
        for done in serve(federation.server, self._exchange, self._config.rounds):
            self._close(done, before)
            self._snapshot(recorded)

    def _restore(self, recorded: SavedRounds) -> None:
        """Brings server, clients and model to where everything has been written."""
        snapshot = recorded.snapshot
        for line in recorded.evaluated:
            self._federation.restore(line, weights=snapshot is None or line.round > snapshot.round, traced=False)
            if snapshot is not None and line.round == snapshot.round:
                self._federation.server.replica.optimizer.weights.set_masters_(snapshot.masters)
        if recorded.evaluated:
            self._log(f"going on after round {recorded.evaluated[-1].round}")

    def _close(self, done: RoundResult, before: Evaluation) -> None:
        """Evaluates after a round where that is due, and writes it down."""
        number, every = done.line.round, self._config.evaluation.every
        due = number == self._config.rounds or (every and number % every == 0)
        if done.traces:
            self._directory.add_traces(number, done.traces)
        self._write(done.line, before if number == CALIBRATION else self._evaluate() if due else None)

    def _evaluate(self) -> Evaluation:
        return evaluate(self._federation.model, self._federation.data.validation)

    def _write(self, line: RoundRecord | None, evaluated: Evaluation | None) -> None:
        timing, now = self._timing, time.perf_counter()
        written = self._metrics.add(
            line,
            evaluated,
            seconds=now - self._begun,
            in_steps=timing.total - self._in_steps,
            in_forwards=timing.forward - self._in_forwards,
        )
        self._begun, self._in_steps, self._in_forwards = now, timing.total, timing.forward
        self._report(
            Progress(
                round=written["round"],
                rounds=self._config.rounds,
                loss=written["loss"],
                accuracy=None if evaluated is None else evaluated.accuracy,
                bytes=self._metrics.bytes,
                steps_per_second=timing.rate,
            )
        )

    def _snapshot(self, recorded: SavedRounds) -> None:
        """Takes a snapshot where one is due and not there yet."""
        replica, every = self._federation.server.replica, self._config.snapshot_every
        round = replica.round - 1
        there = recorded.snapshot is not None and recorded.snapshot.round == round
        by_weights = replica.terms.sends_weights  # the ledger has these
        if round and every and round % every == 0 and not there and not by_weights:
            snapshot = Snapshot(
                round=round,
                seal=self._ledger.seal,
                mask=replica.terms.mask_digest,
                masters=replica.optimizer.weights.masters(),
            )
            snapshot.save(self._directory.path / SNAPSHOT)


__all__ = ["Log", "Progress", "Report", "Rounds"]
