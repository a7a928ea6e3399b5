"""``execute`` runs a federation from its settings; ``resume`` continues a run that was stopped, from its directory."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engine.errors import ConfigError, RunError
from ...engine.mask import SparseMask
from ...engine.parameters import fingerprint
from ..config.run_config import RunConfig, convert, make_config
from ..config.sections import AUTO
from ..config.toml import read_toml
from ..ledger.file import LedgerHeader
from ..setup.data import check_files
from ..setup.model import resolved
from ..setup.pool import ClientPool, LocalPool
from ..setup.server_and_clients import Federation, make_terms
from .directory import CONFIG, MASK, ORIGIN, ORIGIN_REMEDY, Origin, RunDirectory, check_unused, is_run, read_origin
from .finished import check_made_again, has_lost_files, write_lost_files
from .inputs import Inputs, check_before_start, load_inputs
from .metrics import Metrics, read_summary
from .rounds import Log, Progress, Report, Rounds
from .saved_rounds import read_saved_rounds, reopen_ledger
from .shared import Shared
from .summary import client_accuracy_summary, federation_summary, selection_summary

# Settings that say where and how a run is computed. Another machine that resumes it may have others.
_OF_THE_MACHINE = ("device", "backend", "capture", "offload", "calibration_elements")


def execute(
    config: RunConfig,
    output: Path,
    report: Report,
    log: Log,
    *,
    trust_remote_code: bool = False,
    pool: ClientPool | None = None,
    shared: Shared | None = None,
) -> dict[str, Any]:
    """Runs a federation and writes its run directory.

    Args:
        config: the settings.
        output: path of the run directory, which must be empty or not exist.
        report: called after each round, and once before training.
        log: called with one line before each slow preparation, and with lines about the data.
        trust_remote_code: see ``models.load_model``; not a setting, so that no settings file can switch it on.
        pool: the clients; None: all in this process. A run over several processes has the bits of one process with as
            many threads as each of them.
        shared: what was loaded for several runs; None: load it.

    Returns:
        The summary, as in the last line of ``metrics.jsonl``.

    Raises:
        MeerkatError: if settings, model, data or mask do not fit together, a round fails, or no step had a finite loss.
            Files written so far stay.
    """
    check_unused(output)
    check_files(config)
    given_device, config = config.model.device, resolved(config)
    inputs = load_inputs(config, log, trust_remote_code, pool or LocalPool(), shared)
    mask = inputs.choose_mask(log)
    check_before_start(inputs, mask, log)
    if config.mask.file is not None:  # record the density of the mask in use
        inputs = dataclasses.replace(inputs, config=config.replace(density=mask.density))
    # The directory is created only now: an error before this line leaves nothing behind.
    with RunDirectory(output) as directory:
        directory.write_config(inputs.config.replace(device=given_device))  # auto: another machine may resume it
        return _run(inputs, directory, mask, report, log)


def resume(
    path: Path,
    report: Report,
    log: Log,
    *,
    config: RunConfig | None = None,
    trust_remote_code: bool = False,
    pool: ClientPool | None = None,
    shared: Shared | None = None,
) -> dict[str, Any]:
    """Resumes a run that was stopped at any point. It ends with the same bits as a run that was never stopped.

    The same bits need the same machine and number of threads; the log warns if these differ.

    Args:
        path: path of the run directory.
        report: called after each round that was not finished before.
        log: see ``execute``.
        config: the run's settings with other settings of the machine, see ``check_same_settings``; None: as they are in
            the directory.
        trust_remote_code: see ``execute``.
        pool: see ``execute``.
        shared: see ``execute``.

    Returns:
        The summary. If the run is finished, this is its summary, and only files that were lost are written: the mask
        and GradIP, where settings and ledger give them again.

    Raises:
        RunError: if there is no run, another process is writing to it, or a file is damaged.
        LedgerError: if the ledger is damaged, or the base model, mask or settings are not those that the run started
            with.
        ConfigError: if ``config`` has other settings than the run.
        MeerkatError: see ``execute``. An error before the first new round leaves the directory unchanged.
    """
    own = _config_of(path)
    config = own if config is None else config
    if config.digest() != own.digest():
        raise ConfigError(f"the run in {path} has other settings; nothing was changed")
    finished = read_summary(path)
    if finished is not None and not has_lost_files(config, path):
        log("this run is finished; nothing to do")
        return finished
    with RunDirectory(path) as directory:
        has_mask = (path / MASK).exists()
        if has_mask:  # the files that it was chosen from are not needed again
            config = config.replace(mask=None, calibration=None)
        check_files(config)
        config = resolved(config)
        inputs = load_inputs(config, log, trust_remote_code, pool or LocalPool(), shared)
        mask = SparseMask.load(path / MASK, inputs.lm.model) if has_mask else inputs.choose_mask(log)
        if not has_mask and directory.has_ledger():
            check_made_again(mask, path)
        if finished is not None:
            written = write_lost_files(directory, mask, inputs.lm.model, config.model.backend)
            log(f"this run is finished; lost files were written again: {', '.join(written)}")
            return finished
        check_before_start(inputs, mask, log)
        return _run(inputs, directory, mask, report, log)


def check_same_settings(settings: Mapping[str, Any], path: Path) -> RunConfig:
    """Checks that the given settings are those that a run was started with, and returns all settings of the run.

    Settings of the machine (``_OF_THE_MACHINE``) may differ: the given ones replace the run's.

    Args:
        settings: values by flat names; other settings are not compared.
        path: path of the run directory.

    Raises:
        ConfigError: if the run has another value of one of the settings.
        RunError: if there is no run.
    """
    config, given = _config_of(path), convert(settings)
    run_settings = config.flat()
    for name, value in given.items():
        if name in _OF_THE_MACHINE:
            continue
        if name == "density" and config.mask.file is not None:  # config.toml has the density of the mask file
            continue
        if name == "dtype" and value == AUTO:  # config.toml has the dtype that it stood for
            continue
        if value != run_settings[name]:
            raise ConfigError(
                f"the run in {path} has {name} {run_settings[name]}, {value} was given; a run keeps the settings that "
                f"it started with, so leave {name} out; nothing was changed"
            )
    return config.replace(**{name: value for name, value in given.items() if name in _OF_THE_MACHINE})


def _config_of(path: Path) -> RunConfig:
    if not is_run(path):
        raise RunError(
            f"{path} holds no run to resume (no {CONFIG}); start one with `meerkat-engine run --output {path}`, or "
            f"give settings together with --resume"
        )
    return make_config(read_toml(path / CONFIG))


def _check_origin(directory: RunDirectory, current: Origin, log: Log) -> None:
    """Compares this process with the origin of the run, if it has one.

    Raises:
        RunError: if settings or examples have changed, or ``origin.json`` is lost. Other differences are logged.
    """
    origin = read_origin(directory.path)
    if origin is None:
        if directory.has_ledger():
            raise RunError(
                f"{directory.path} has a ledger, but {ORIGIN} is missing; {ORIGIN_REMEDY}; nothing was changed"
            )
        return
    if origin.settings != current.settings:
        raise RunError(
            f"{directory.path / CONFIG} has changed since the run started, or an earlier version wrote it; nothing was "
            f"changed"
        )
    if origin.data != current.data:
        raise RunError(
            f"the examples, or their partition among the clients, have changed since the run in {directory.path} "
            f"started; nothing was changed"
        )
    for difference in current.differences(origin):
        log(f"the run started with {difference}: its bits may differ from those of a run that was never stopped")


def _run(inputs: Inputs, directory: RunDirectory, mask: SparseMask, report: Report, log: Log) -> dict[str, Any]:
    """Runs all rounds that are not in the directory yet, and writes and returns the summary."""
    config = inputs.config
    origin = Origin.of_this_process(data=inputs.data_digest, settings=config.digest(), device=config.model.device)
    header = LedgerHeader(
        terms=make_terms(config, mask),
        base=inputs.base,
        method=config.method,
        clients=config.clients.count,
        aggregation=config.aggregation.build(),
    )
    _check_origin(directory, origin, log)
    saved = read_saved_rounds(directory, header)
    directory.write_mask_and_origin(mask, origin)
    with reopen_ledger(directory, header, saved) as ledger:
        federation = Federation(
            config, inputs.lm.model, mask, inputs.data, inputs.shares, ledger, inputs.pool.micro_batch_map
        )
        exchange = inputs.pool.connect(federation, directory.path / MASK)
        metrics = Metrics(directory, saved.metrics, len(inputs.data.validation))
        rounds = Rounds(federation, exchange, directory, ledger, metrics, report, log)
        rounds.run(saved, None if inputs.shared is None else inputs.shared.initial)
    metrics.check_trained(header.terms.queries)
    summary = metrics.summary() | federation_summary(federation)
    label_counts = inputs.label_counts if inputs.data.train.class_names else []
    summary |= selection_summary(federation.selection, label_counts)
    summary |= client_accuracy_summary(metrics.recalls, label_counts, federation.selection.stopped)
    summary |= {
        "labels": list(inputs.data.train.class_names),
        **(inputs.partition_summary() if inputs.shares else {}),
        "base": inputs.base,
        "mask": mask.digest,
        "mask_source": mask.source,
        "weights": fingerprint(inputs.lm.model),
        "machine": {
            "python": origin.python,
            "torch": origin.torch,
            "threads": origin.threads,
            "device": config.model.device,
            "processes": inputs.pool.processes,
        },
    }
    metrics.finish(summary)
    return summary


__all__ = ["Progress", "check_same_settings", "execute", "resume"]
