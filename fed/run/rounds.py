"""``Rounds``: runs the remaining rounds of a run, and writes each to the run directory when it ends."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ...engine.lm.evaluation import Evaluation, evaluate
from ...engine.lm.scores import SCORES
from ...engine.lm.text_metrics import check_metrics
from ..exchange import Exchange, serve
from ..ledger.file import LedgerWriter, RoundRecord
from ..ledger.snapshot import Snapshot
from ..server import RoundResult
from ..setup.server_and_clients import Federation
from ..terms import CALIBRATION
from .directory import SNAPSHOT, RunDirectory
from .gradip_file import append_traces
from .metrics import Metrics
from .saved_rounds import SavedRounds

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run after a round.

    Args:
        round: number of the round; 0 is before training.
        rounds: total number of rounds.
        loss: mean training loss of the round (round 0: validation loss); None if no client reported one.
        score: title and value of the task's main score on the held-out examples; None if the model was not evaluated
            after the round.
        bytes: bytes sent so far in both directions.
        steps_per_second: mean speed of the local steps so far in this process.
    """

    round: int
    rounds: int
    loss: float | None
    score: tuple[str, float] | None
    bytes: int
    steps_per_second: float


Report = Callable[[Progress], None]


class Rounds:
    """Runs the remaining rounds of a run, and writes each to the run directory when it ends.

    Args:
        federation: the run's server and clients, at the start of the run.
        exchange: carries requests to the clients and their answers back.
        directory: the run directory.
        ledger: the open ledger.
        metrics: the run's metrics.
        report: called after each round.
        log: called with lines for the user.
    """

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
        self._last_time, self._in_steps, self._in_forwards = time.perf_counter(), 0.0, 0.0
        self._said: str | None = None
        self._said_generating = False

    def run(self, saved: SavedRounds, of_base: Evaluation | None = None) -> None:
        """Restores the saved rounds, then runs the others up to the last.

        Args:
            saved: the rounds in the run directory.
            of_base: the evaluation before training; None: as it is in the run directory, or evaluate.
        """
        self._restore(saved)
        federation = self._federation
        written = self._metrics.initial_evaluation()
        initial = written or of_base or self._evaluate()
        if written is None and not federation.server.replica.terms.calibration_steps:
            self._write(None, initial)
        for record in saved.pending:
            self._finish_round(federation.restore(record), initial, saved.crc_of(record))
        self._save_snapshot_if_due(saved)
        if federation.server.round == CALIBRATION:
            self._log(
                f"calibration: {self._config.selection.steps} steps of every client, to find extreme non-IID clients"
            )
        for result in serve(federation.server, self._exchange, self._config.rounds):
            self._say_how_steps_run()
            self._finish_round(result, initial, self._ledger.crc)
            self._save_snapshot_if_due(saved)

    def _restore(self, saved: SavedRounds) -> None:
        """Brings server, clients and model to the last round of which everything has been written.

        Writes lines of GradIP that were lost.
        """
        snapshot = saved.snapshot
        for number, record in enumerate(saved.complete):
            result = self._federation.restore(
                record,
                update_model=snapshot is None or record.round > snapshot.round,
                compute_traces=number >= saved.traced,
            )
            if number >= saved.traced and result.traces:
                append_traces(self._directory, record.round, result.traces, saved.crc_of(record))
            if snapshot is not None and record.round == snapshot.round:
                self._federation.server.replica.optimizer.weights.set_masters_(snapshot.masters)
        if saved.complete:
            self._log(f"resuming after round {saved.complete[-1].round}")

    def _finish_round(self, result: RoundResult, initial: Evaluation, ledger_crc: int) -> None:
        """Evaluates the model after a round if that is due, and writes GradIP and metrics of the round.

        Args:
            result: result of the round.
            initial: evaluation before training.
            ledger_crc: CRC-32 of the round's line in the ledger.
        """
        number, every = result.record.round, self._config.evaluation.every
        if result.traces:
            append_traces(self._directory, number, result.traces, ledger_crc)
        evaluation = None
        if number == CALIBRATION:  # which does not change the model
            evaluation = initial
        elif number == self._config.rounds or (every and number % every == 0):
            evaluation = self._evaluate()
        self._write(result.record, evaluation)

    def _say_how_steps_run(self) -> None:
        """Logs on a GPU, when it is known, whether local steps are CUDA graphs."""
        line = self._federation.how_steps_run()
        if line != self._said and line is not None:
            self._said = line
            self._log(line)

    def _evaluate(self) -> Evaluation:
        settings, data = self._config.evaluation, self._federation.data.validation
        metrics = check_metrics(settings.metrics)
        if metrics and not self._said_generating:
            self._said_generating = True
            self._log(f"each evaluation generates answers to {len(data)} held-out examples ({settings.metrics})")
        evaluation = evaluate(self._federation.model, data, metrics=metrics, max_new_tokens=settings.max_new_tokens)
        if evaluation.nonfinite:
            self._log(
                f"{evaluation.nonfinite} of {evaluation.examples} held-out examples have scores that are not finite; "
                f"{SCORES[evaluation.main[0]].if_not_finite}"
            )
        return evaluation

    def _write(self, record: RoundRecord | None, evaluation: Evaluation | None) -> None:
        """Writes and reports the metrics of a round; see ``Metrics.add``."""
        timing, now = self._timing, time.perf_counter()
        line = self._metrics.add(
            record,
            evaluation,
            seconds=now - self._last_time,
            in_steps=timing.total - self._in_steps,
            in_forwards=timing.forward - self._in_forwards,
        )
        self._last_time, self._in_steps, self._in_forwards = now, timing.total, timing.forward
        self._report(
            Progress(
                round=line["round"],
                rounds=self._config.rounds,
                loss=line["loss"],
                score=None if evaluation is None else (SCORES[evaluation.main[0]].title, evaluation.main[1]),
                bytes=self._metrics.bytes,
                steps_per_second=timing.rate,
            )
        )

    def _save_snapshot_if_due(self, saved: SavedRounds) -> None:
        """Writes a snapshot of the last round if one is due and the file does not hold it already."""
        replica, every = self._federation.server.replica, self._config.snapshot_every
        round = replica.round - 1
        exists = saved.snapshot is not None and saved.snapshot.round == round
        in_ledger = replica.terms.sends_weights  # then the ledger holds the masters
        if round and every and round % every == 0 and not exists and not in_ledger:
            snapshot = Snapshot(
                round=round,
                crc=self._ledger.crc,
                mask=replica.terms.mask_digest,
                masters=replica.masters(),
            )
            snapshot.save(self._directory.path / SNAPSHOT)


__all__ = ["Log", "Progress", "Report", "Rounds"]
