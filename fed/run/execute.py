"""``execute`` and ``resume``: a run from its settings, or from what it left behind, to its last round."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...engine.backend import resolve
from ...engine.errors import ConfigError, RunError
from ...engine.lm.models import LanguageModel, check_device
from ...engine.mask import SparseMask
from ...engine.parameters import fingerprint
from ..config.run_config import RunConfig, convert, make_config
from ..config.toml import read_toml
from ..ledger.file import LedgerHeader, read_ledger
from ..partition import histogram
from ..privacy import largest_epsilon
from ..setup.data import TaskData, check_files, client_shares, encode
from ..setup.mask import make_mask
from ..setup.model import load_language_model
from ..setup.pool import ClientPool, LocalPool
from ..setup.server_and_clients import Federation, check_perturbation, check_selection, make_terms
from .directory import CONFIG, LEDGER, MASK, ORIGIN, Origin, RunDirectory, check_unused, is_run, read_origin
from .metrics import Metrics, read_summary
from .rounds import Log, Progress, Report, Rounds
from .saved_rounds import read_saved_rounds, reopen_ledger
from .summary import federation_summary, selection_summary


def execute(
    config: RunConfig,
    output: Path,
    report: Report,
    log: Log,
    *,
    trust_remote_code: bool = False,
    pool: ClientPool | None = None,
) -> dict[str, Any]:
    """Runs a federation and writes its run directory.

    Args:
        config: the settings.
        output: a directory that is empty or does not exist.
        report: called after every round.
        log: called with a line before each slow preparation, and about the data.
        trust_remote_code: see ``models.load_model``; no setting, so that no file can ask for it.
        pool: where the clients are; None: in this process. The bits of clients in several processes are those of one
            process with as many threads as each of these has.

    Returns:
        The summary, as in the last line of ``metrics.jsonl``.

    Raises:
        MeerkatError: for any input that does not fit; what was complete on disk stays.
    """
    check_unused(output)
    check_files(config)
    it = _prepare(config, log, trust_remote_code, pool or LocalPool())
    mask = it.mask(log)  # before there is a directory: until here, whatever fails leaves nothing
    _check(it, mask, log)
    if config.mask.file is not None:
        it = dataclasses.replace(it, config=config.replace(density=mask.density))  # what was used
    with RunDirectory(output) as directory:
        directory.begin(it.config)
        return _run(it, directory, mask, report, log)


def resume(
    path: Path,
    report: Report,
    log: Log,
    *,
    trust_remote_code: bool = False,
    pool: ClientPool | None = None,
) -> dict[str, Any]:
    """Goes on with a run that was stopped, wherever it was; ends on the bits of one that was not.

    That holds on the same machine with the same number of threads; where these differ, it is said.

    Args:
        path: run directory.
        report: called after every round that is new.
        log: as for ``execute``.
        trust_remote_code: as for ``execute``.
        pool: as for ``execute``.

    Returns:
        The summary; that of a finished run, of which nothing is changed.

    Raises:
        RunError: if there is no run, another process is at it, or a file is damaged.
        LedgerError: if the ledger is damaged, or the base model, mask or settings are no longer those it began with.
        MeerkatError: as ``execute``. Whatever is raised, the run stays as it was.
    """
    config = _config_of(path)
    finished = read_summary(path)
    if finished is not None:
        _check_finished(config, path)
        log("this run is finished; nothing to do")
        return finished
    with RunDirectory(path) as directory:
        made = (path / MASK).exists()
        if made:  # what it was made of is no longer needed
            config = config.replace(mask=None, calibration=None)
        check_files(config)
        it = _prepare(config, log, trust_remote_code, pool or LocalPool())
        mask = SparseMask.load(path / MASK, it.lm.model) if made else it.mask(log)
        _check(it, mask, log)
        return _run(it, directory, mask, report, log)


def check_same_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Raises ``ConfigError`` if a run began with others than these settings, ``RunError`` if there is none."""
    config = _config_of(path)
    known = config.flat()
    for name, value in convert(settings).items():
        if name == "density" and config.mask.file is not None:  # what is written down is the mask's
            continue
        if value != known[name]:
            raise ConfigError(
                f"the run in {path} has {name} {known[name]}, {value} was given; a run goes on with its own "
                f"settings, nothing was changed"
            )


def _config_of(path: Path) -> RunConfig:
    if not is_run(path):
        raise RunError(
            f"{path} holds no run to go on with (no {CONFIG}); `meerkat-engine run --output {path}`, or "
            f"--resume with settings, begins one"
        )
    return make_config(read_toml(path / CONFIG))


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What a run works with, but for the mask; no shares where the clients are elsewhere."""

    config: RunConfig
    lm: LanguageModel
    data: TaskData
    shares: list[Tensor]
    base: str
    pool: ClientPool

    def mask(self, log: Log) -> SparseMask:
        log(f"choosing the mask ({self.config.mask.file or self.config.method.recipe.elements})")
        return make_mask(self.config, self.lm, self.data.train)

    @property
    def digest(self) -> str:
        """Of the examples and of who has which."""
        return self.data.digest(self.shares)

    @property
    def labels(self) -> list[list[int]]:
        """Examples by client and label."""
        return histogram(self.data.train.labels, self.shares, len(self.data.train.task.label_words))

    @property
    def names(self) -> list[Any]:
        """Of the clients, where they are natural."""
        return sorted(set(self.data.groups or ()))

    def dealt(self) -> dict[str, Any]:
        """Which examples the clients were dealt, as the summary has it."""
        config, many = self.config, f"{len(self.shares)} clients"
        few = len(self.shares) <= 100
        return {
            "partition": config.clients.partition.describe(config.clients.alpha),
            "examples_by_client_and_label": self.labels if few else many,
            **({"natural_clients": self.names if few else many} if self.names else {}),
        }


def _prepare(config: RunConfig, log: Log, trust_remote_code: bool, pool: ClientPool) -> _Inputs:
    for line in pool.prepare(config):
        log(line)
    if config.model.backend != "auto":
        resolve(
            config.model.backend, check_device(config.model.device)
        )  # an unfit one is told before anything slow begins
    log(f"loading the model {config.model.source} and the task {config.task.name}")
    log(
        f"{config.method}: {config.rounds} rounds of {config.local_steps} local steps, learning rate {config.step.lr:g}"
    )
    lm = load_language_model(config, trust_remote_code=trust_remote_code)
    data = encode(config, lm.tokenizer)
    shares = client_shares(config, data) if pool.simulated else []
    base = fingerprint(lm.model)
    it = _Inputs(config=config, lm=lm, data=data, shares=shares, base=base, pool=pool)
    pool.check(base, it.digest)
    for i, row in enumerate(it.labels[:8]):
        called = f" ({it.names[i]})" if it.names else ""
        log(f"client {i}{called}: {sum(row)} examples, {row} by label")
    if len(shares) > 8:
        log(f"... {config.clients.count - 8} more clients; `meerkat-engine report` draws them")
    return it


def _check(it: _Inputs, mask: SparseMask, log: Log) -> None:
    """Raises ``MeerkatError`` for what is known to fail later, before anything is written."""
    check_selection(it.config, mask, it.data)
    told = check_perturbation(it.config, it.lm.model, mask)
    if told is not None:
        log(told)
    terms = make_terms(it.config, mask)
    if terms.privacy is not None and it.shares:
        steps = terms.calibration_steps + it.config.rounds * terms.local_steps
        whole = largest_epsilon(terms.privacy, {(len(share), steps) for share in it.shares}, terms.queries)
        log(
            f"differential privacy: epsilon {whole:.3g} at delta {terms.privacy.delta:g} at most, after all "
            f"rounds (simulated: the noise follows from the seed)"
        )


def _check_finished(config: RunConfig, path: Path) -> None:
    """Raises ``MeerkatError`` if a finished run is not whole any more."""
    ledger, began = read_ledger(path / LEDGER), read_origin(path)
    if began is None or began.settings != config.digest():
        raise RunError(f"{path / CONFIG} is not what the run began with, or {ORIGIN} is lost; nothing was changed")
    if SparseMask.load(path / MASK).digest != ledger.header.terms.mask_digest:
        raise RunError(f"{path / MASK} is not the mask of the run; nothing was changed")


def _check_origin(directory: RunDirectory, here: Origin, log: Log) -> None:
    """Raises ``RunError`` unless a run goes on with what it began with; says what else is different."""
    began = read_origin(directory.path)
    if began is None:
        if directory.has_ledger():
            raise RunError(f"{directory.path} has a ledger and no {ORIGIN}: it is lost; nothing was changed")
        return
    if began.settings != here.settings:
        raise RunError(f"{directory.path / CONFIG} is not what the run began with; nothing was changed")
    if began.data != here.data:
        raise RunError(
            f"the examples, or who has which, are not those that the run in {directory.path} began with; "
            f"nothing was changed"
        )
    for difference in here.differences(began):
        log(f"the run began with {difference}: its bits may not be those of a run that was never stopped")


def _run(it: _Inputs, directory: RunDirectory, mask: SparseMask, report: Report, log: Log) -> dict[str, Any]:
    """Begins a run in its directory, or goes on with the one that is there, to its end."""
    config = it.config
    here = Origin.here(data=it.digest, settings=config.digest(), device=config.model.device)
    header = LedgerHeader(
        terms=make_terms(config, mask),
        base=it.base,
        method=config.method,
        clients=config.clients.count,
        aggregation=config.aggregation.build(),
    )
    _check_origin(directory, here, log)
    recorded = read_saved_rounds(directory, header)
    directory.keep(mask, here)
    with reopen_ledger(directory, header, recorded) as ledger:
        federation = Federation(config, it.lm.model, mask, it.data, it.shares, ledger, it.pool.micro_batch_map)
        exchange = it.pool.connect(federation, directory.path / MASK)
        metrics = Metrics(directory, recorded.metrics, len(it.data.validation))
        Rounds(federation, exchange, directory, ledger, metrics, report, log).run(recorded)
    summary = metrics.summary() | federation_summary(federation) | selection_summary(federation.selection, it.labels)
    summary |= {
        "labels": [word.strip() for word in it.data.train.task.label_words],
        **(it.dealt() if it.shares else {}),
        "base": it.base,
        "mask": mask.digest,
        "mask_source": mask.source,
        "weights": fingerprint(it.lm.model),
        "machine": {
            "python": here.python,
            "torch": here.torch,
            "threads": here.threads,
            "device": config.model.device,
            "processes": it.pool.processes,
        },
    }
    metrics.finish(summary)
    return summary


__all__ = ["Progress", "check_same_settings", "execute", "resume"]
