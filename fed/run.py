"""``execute`` and ``resume``: a run from its settings, or from what it left behind, to its last round."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backend import resolve
from ..errors import ConfigError, RunError
from ..evaluation import Evaluation, evaluate
from ..mask import SparseMask
from ..models import LanguageModel, check_device
from ..parameters import fingerprint, floating_parameters
from . import setup
from .attack import attack_of
from .config import RunConfig, as_settings, make_config, read_toml
from .federation import Federation, check_moves, check_selection, terms_of
from .ledger import Header, LedgerWriter, Round
from .masks import make_mask
from .methods import Gradient
from .metrics import Metrics, summary_in
from .partition import histogram, split
from .privacy import largest_epsilon
from .recorded import Recorded, go_on, read_recorded
from .rundir import CONFIG, MASK, SNAPSHOT, Origin, RunDirectory, check_free, is_run
from .selection import Selection
from .server import RoundResult
from .setup import TaskData
from .simulation import simulate
from .snapshot import Snapshot
from .task_choice import chosen_task
from .terms import CALIBRATION

Say = Callable[[str], None]


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


def execute(
    config: RunConfig, output: Path, report: Report, say: Say, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Runs a federation and writes its run directory.

    Args:
        config: the settings.
        output: a directory that is empty or does not exist.
        report: called after every round.
        say: called with a line before each slow preparation, and about the data.
        trust_remote_code: see ``models.load_model``; no setting, so that no file can ask for it.

    Returns:
        The summary, as in the last line of ``metrics.jsonl``.

    Raises:
        MeerkatError: for any input that does not fit; what was complete on disk stays.
    """
    check_free(output)
    setup.check_files(config)
    it = _prepare(config, say, trust_remote_code)
    mask = it.mask(say)  # before there is a directory: until here, whatever fails leaves nothing
    _check(it, mask, say)
    if config.mask is not None:
        it = dataclasses.replace(it, config=dataclasses.replace(config, density=mask.density))  # what was used
    with RunDirectory(output) as directory:
        directory.begin(it.config)
        return _carry_out(it, directory, directory.keep_mask(lambda: mask), report, say)


def resume(path: Path, report: Report, say: Say, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Goes on with a run that was stopped, wherever it was; ends on the bits of one that was not.

    That holds on the same machine with the same number of threads; where these differ, it is said.

    Args:
        path: run directory.
        report: called after every round that is new.
        say: as for ``execute``.
        trust_remote_code: as for ``execute``.

    Returns:
        The summary; that of a finished run, of which nothing is changed.

    Raises:
        RunError: if there is no run, another process is at it, or a file is damaged.
        LedgerError: if the ledger is damaged, or the base model, mask or settings are no longer those it began with.
        MeerkatError: as ``execute``. Whatever is raised, the run stays as it was.
    """
    config = _config_of(path)
    with RunDirectory(path) as directory:
        if (path / MASK).exists():  # and what it was made of is no longer needed
            config = dataclasses.replace(config, mask=None, calibration=None)
        finished = summary_in(directory)
        if finished is not None:
            say("this run is finished; nothing to do")
            return finished
        setup.check_files(config)
        it = _prepare(config, say, trust_remote_code)
        mask = directory.keep_mask(lambda: it.mask(say))
        mask.check(it.lm.model)
        _check(it, mask, say)
        return _carry_out(it, directory, mask, report, say)


def check_same(settings: Mapping[str, Any], path: Path) -> None:
    """Raises ``ConfigError`` if a run began with others than these settings, ``RunError`` if there is none."""
    config = _config_of(path)
    for name, value in as_settings(settings).items():
        if value != getattr(config, name):
            raise ConfigError(
                f"the run in {path} has {name} {getattr(config, name)}, {value} was given; a run goes on with its own "
                f"settings, nothing was changed"
            )


def _config_of(path: Path) -> RunConfig:
    if not is_run(path):
        raise RunError(
            f"{path} holds no run to go on with (no {CONFIG}); `meerkat-engine run --output {path}` begins one"
        )
    return make_config(read_toml(path / CONFIG))


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What a run works with, but for the mask."""

    config: RunConfig
    lm: LanguageModel
    data: TaskData
    shares: list[Tensor]
    base: str

    def mask(self, say: Say) -> SparseMask:
        say(f"choosing the mask ({self.config.mask or self.config.method.recipe.elements})")
        return make_mask(self.config, self.lm, self.data.train)

    @property
    def labels(self) -> list[list[int]]:
        """Examples by client and label."""
        return histogram(self.data.train.labels, self.shares, len(self.data.train.task.label_words))

    @property
    def names(self) -> list[Any]:
        """Of the clients, where they are natural."""
        return sorted(set(self.data.groups or ()))


def _prepare(config: RunConfig, say: Say, trust_remote_code: bool) -> _Prepared:
    if config.backend != "auto":
        resolve(config.backend, check_device(config.device))  # an unfit one is told before anything slow begins
    say(f"loading the model {config.model} and the task {chosen_task(config).name}")
    say(f"{config.method}: {config.rounds} rounds of {config.local_steps} local steps, learning rate {config.lr:g}")
    lm = setup.load_language_model(config, trust_remote_code=trust_remote_code)
    data = setup.encode(config, lm.tokenizer)
    shares = split(
        data.train.labels,
        config.clients,
        config.partition,
        config.seed,
        alpha=config.alpha,
        at_least=config.batch_size,
        groups=data.groups,
    )
    it = _Prepared(config=config, lm=lm, data=data, shares=shares, base=fingerprint(lm.model))
    for i, row in enumerate(it.labels[:8]):
        called = f" ({it.names[i]})" if it.names else ""
        say(f"client {i}{called}: {sum(row)} examples, {row} by label")
    if config.clients > 8:
        say(f"... {config.clients - 8} more clients; `meerkat-engine report` draws them")
    return it


def _check(it: _Prepared, mask: SparseMask, say: Say) -> None:
    """Raises ``MeerkatError`` for what is known to fail later, before anything is written."""
    check_selection(it.config, mask, it.data)
    told = check_moves(it.config, it.lm.model, mask)
    if told is not None:
        say(told)


def _carry_out(it: _Prepared, directory: RunDirectory, mask: SparseMask, report: Report, say: Say) -> dict[str, Any]:
    """Begins a run in its directory, or goes on with the one that is there, to its end."""
    config = it.config
    here = Origin.here(it.data.digest, config.device)
    began = directory.keep_origin(here)
    if began.data != here.data:
        raise RunError(f"the examples are not those that the run in {directory.path} began with; nothing was changed")
    for difference in here.differences(began):
        say(f"the run began with {difference}: its bits may not be those of a run that was never stopped")
    header = Header(
        terms=terms_of(config, mask),
        base=it.base,
        method=config.method,
        clients=config.clients,
        aggregation=config.how_aggregated(),
    )
    if header.terms.privacy is not None:
        steps = header.terms.calibration_steps + config.rounds * config.local_steps
        whole = largest_epsilon(header.terms.privacy, {(len(share), steps) for share in it.shares}, config.queries)
        say(f"differential privacy: epsilon {whole:.3g} at delta {config.dp_delta:g} at most, after all rounds")
    recorded = read_recorded(directory, header)
    with go_on(directory, header, recorded) as ledger:
        federation = Federation(config, it.lm.model, mask, it.data, it.shares, ledger)
        metrics = Metrics(directory, recorded.metrics, len(it.data.validation))
        _Rounds(federation, directory, ledger, metrics, report, say).run(recorded)
    summary = metrics.summary() | _of_weights(federation) | _selected(federation.selection, it.labels)
    summary |= {
        **({"delta": config.dp_delta} if config.dp_noise else {}),
        "partition": config.partition.describe(config.alpha),
        "labels": [word.strip() for word in it.data.train.task.label_words],
        "examples_by_client_and_label": it.labels if config.clients <= 100 else f"{config.clients} clients",
        **({"natural_clients": it.names if len(it.names) <= 100 else f"{len(it.names)} clients"} if it.names else {}),
        **attack_of(config.attack, config.clients, config.attackers),
        "base": it.base,
        "mask": mask.digest,
        "mask_source": mask.source,
        "weights": fingerprint(it.lm.model),
        "machine": {"python": here.python, "torch": here.torch, "threads": here.threads, "device": config.device},
    }
    metrics.finish(summary)
    return summary


class _Rounds:
    """The rounds of a run, each written down when it is over."""

    def __init__(
        self,
        federation: Federation,
        directory: RunDirectory,
        ledger: LedgerWriter,
        metrics: Metrics,
        report: Report,
        say: Say,
    ) -> None:
        self._federation, self._directory, self._ledger, self._metrics = federation, directory, ledger, metrics
        self._report, self._say = report, say
        self._config, self._timing = federation.config, federation.timing
        self._begun, self._in_steps, self._in_forwards = time.perf_counter(), 0.0, 0.0

    def run(self, recorded: Recorded) -> None:
        """From wherever the run is to its last round."""
        self._restore(recorded)
        federation = self._federation
        before = self._metrics.before()
        if before is None:
            before = self._evaluate()
            if not federation.server.replica.terms.calibration_steps:
                self._write(None, before)
        for line in recorded.untold:
            self._close(federation.restore(line), before)
        self._snapshot(recorded)
        if federation.server.round == CALIBRATION:
            self._say(f"a path of {self._config.vp_steps} steps of every client, to find the extreme ones")
        for done in simulate(federation.server, federation.clients, self._config.rounds):
            self._close(done, before)
            self._snapshot(recorded)

    def _restore(self, recorded: Recorded) -> None:
        """Brings server, clients and model to where everything has been written."""
        snapshot = recorded.snapshot
        for line in recorded.told:
            self._federation.restore(line, weights=snapshot is None or line.round > snapshot.round)
            if snapshot is not None and line.round == snapshot.round:
                self._federation.server.replica.optimizer.weights.set_masters_(snapshot.masters)
        if recorded.told:
            self._say(f"going on after round {recorded.told[-1].round}")

    def _close(self, done: RoundResult, before: Evaluation) -> None:
        """Evaluates after a round where that is due, and writes it down."""
        number, every = done.line.round, self._config.eval_every
        due = number == self._config.rounds or (every and number % every == 0)
        if done.traces:
            self._directory.add_traces(number, done.traces)
        self._write(done.line, before if number == CALIBRATION else self._evaluate() if due else None)

    def _evaluate(self) -> Evaluation:
        return evaluate(self._federation.model, self._federation.data.validation)

    def _write(self, line: Round | None, evaluated: Evaluation | None) -> None:
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
                steps_per_second=timing.steps / timing.total if timing.steps else 0.0,
            )
        )

    def _snapshot(self, recorded: Recorded) -> None:
        """Takes a snapshot where one is due and not there yet."""
        replica, every = self._federation.server.replica, self._config.snapshot_every
        round = replica.round - 1
        there = recorded.snapshot is not None and recorded.snapshot.round == round
        by_weights = replica.terms.gradient is Gradient.BACKPROPAGATION  # the ledger has these
        if round and every and round % every == 0 and not there and not by_weights:
            snapshot = Snapshot(
                round=round,
                seal=self._ledger.seal,
                mask=replica.terms.mask_digest,
                masters=replica.optimizer.weights.masters(),
            )
            snapshot.save(self._directory.path / SNAPSHOT)


def _of_weights(federation: Federation) -> dict[str, Any]:
    """How much is trained, and what sending weights would have cost."""
    config, weights = federation.config, [p for _, p in floating_parameters(federation.model)]
    elements = federation.server.replica.terms.elements
    answers = config.rounds * (config.clients_per_round or config.clients)  # the calibration would send no weights
    return {
        "truncated_train": federation.data.train.truncated,
        "truncated_validation": federation.data.validation.truncated,
        "bytes_each_way_if_weights_were_sent": sum(p.numel() * p.element_size() for p in weights) * answers,
        # adapters, layers and whole models have names, which need no ids
        "mask_bytes": 8 * elements if config.method.recipe.elements.ranked else 0,
        "masked_elements": elements,
        "elements": sum(p.numel() for p in weights),
        "rejected_messages": dict(sorted(federation.server.rejected.items())),
    }


def _selected(selection: Selection, labels: list[list[int]]) -> dict[str, Any]:
    """Who was stopped early, why, and how well that found the clients that hold one label only."""
    if selection.thresholds is None:
        return {}
    single = {i for i, row in enumerate(labels) if sum(count > 0 for count in row) == 1}
    right = len(single.intersection(selection.stopped))
    return {
        "stopped": selection.stopped,
        "single_label_clients": sorted(single),
        "precision": right / len(selection.stopped) if selection.stopped else None,
        "recall": right / len(single) if single else None,
        "vp_thresholds": dataclasses.asdict(selection.thresholds),
        "vp_statistics": {i: dataclasses.asdict(found) for i, found in selection.statistics.items()},
    }


__all__ = ["Progress", "check_same", "execute", "resume"]
