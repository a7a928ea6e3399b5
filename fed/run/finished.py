"""A finished run: whether its files belong together, and files that follow from the others made again."""

from pathlib import Path

from torch import nn

from ...engine.errors import RunError
from ...engine.mask import SparseMask
from ..config.run_config import RunConfig
from ..gradip import GradIP
from ..ledger.file import Ledger, read_ledger
from .directory import CONFIG, GRADIP, LEDGER, MASK, ORIGIN, ORIGIN_REMEDY, RunDirectory, read_origin
from .gradip_file import append_traces, read_gradip


def has_lost_files(config: RunConfig, path: Path) -> bool:
    """Whether files of a finished run are missing or incomplete that follow from the others.

    Args:
        config: the run's settings.
        path: path of the run directory.

    Raises:
        MeerkatError: if a file is damaged or changed, or is missing and does not follow from the others.
    """
    ledger, origin = read_ledger(path / LEDGER), read_origin(path)
    if origin is None:
        raise RunError(f"{path / ORIGIN} is missing; {ORIGIN_REMEDY}; nothing was changed")
    if origin.settings != config.digest():
        raise RunError(
            f"{path / CONFIG} has changed since the run started, or an earlier version wrote it; nothing was changed"
        )
    traced = len(read_gradip(path, ledger))
    if not (path / MASK).exists():
        return True
    mask = SparseMask.load(path / MASK)
    if mask.digest != ledger.header.terms.mask_digest:
        raise RunError(
            f"{path / MASK} is not the mask that the ledger names; put the right one back, or delete it; nothing was "
            f"changed"
        )
    return _has_gradip(mask, ledger) and traced < len(ledger.lines)


def check_made_again(mask: SparseMask, path: Path) -> None:
    """Checks a mask that was made again because its file is missing; raises ``RunError`` if it is another one."""
    digest = read_ledger(path / LEDGER).header.terms.mask_digest
    if mask.digest != digest:
        raise RunError(
            f"{path / MASK} is missing, and the mask that the settings give here is {mask.digest[:12]}; the run uses "
            f"{digest[:12]}; put the file back, or resume on the machine that {ORIGIN} describes; nothing was changed"
        )


def write_lost_files(directory: RunDirectory, mask: SparseMask, model: nn.Module, backend: str) -> list[str]:
    """Writes the files of a finished run that are missing; returns their names.

    Args:
        directory: the run directory.
        mask: the run's mask.
        model: the model, which determines the device that computes GradIP.
        backend: see ``backend.resolve``.
    """
    ledger = read_ledger(directory.path / LEDGER)
    written = [] if (directory.path / MASK).exists() else [MASK]
    directory.write_mask(mask)
    traced = len(read_gradip(directory.path, ledger))
    if not _has_gradip(mask, ledger) or traced == len(ledger.lines):
        return written
    directory.truncate_lines(GRADIP, traced)
    gradip, terms = GradIP(mask, next(model.parameters()).device, backend), ledger.header.terms
    for record, crc in zip(ledger.lines[traced:], ledger.crcs[1 + traced :], strict=True):
        append_traces(directory, record.round, gradip.traces(terms.seeds(record.round), record.clients), crc)
    return [*written, GRADIP]


def _has_gradip(mask: SparseMask, ledger: Ledger) -> bool:
    """Whether the run has a ``gradip.jsonl``."""
    return mask.gradient is not None and not ledger.header.terms.sends_weights


__all__ = ["check_made_again", "has_lost_files", "write_lost_files"]
