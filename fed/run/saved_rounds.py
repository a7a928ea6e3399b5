"""What a run that was stopped left behind, checked before anything is written to it again."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from ...engine.errors import LedgerError, RunError
from ..ledger.file import Ledger, LedgerHeader, LedgerWriter, RoundRecord, read_ledger
from ..ledger.snapshot import Snapshot
from .directory import GRADIP, LEDGER, METRICS, SNAPSHOT, RunDirectory
from .jsonl import Line, read_lines
from .metrics import check_metrics_line


@dataclass(frozen=True, kw_only=True)
class SavedRounds:
    """The rounds on disk; empty for a run that begins.

    Args:
        ledger: None where not even its header is whole.
        metrics: their lines, round 0 first.
        traced: lines of GradIP that belong to these.
        snapshot: of one of these rounds, or None.
    """

    ledger: Ledger | None = None
    metrics: list[Line] = field(default_factory=list)
    traced: int = 0
    snapshot: Snapshot | None = None

    @property
    def evaluated(self) -> list[RoundRecord]:
        """Rounds of which everything has been written."""
        return [line for line in self._lines if line.round < len(self.metrics)]

    @property
    def pending(self) -> list[RoundRecord]:
        """Rounds that are in the ledger, and not yet in the metrics."""
        return [line for line in self._lines if line.round >= len(self.metrics)]

    @property
    def _lines(self) -> list[RoundRecord]:
        return self.ledger.lines if self.ledger is not None else []


def read_saved_rounds(directory: RunDirectory, header: LedgerHeader) -> SavedRounds:
    """Reads what is in a run directory.

    Args:
        directory: of the run.
        header: that its ledger should have.

    Raises:
        LedgerError: if the ledger is damaged or of another run, or the snapshot is.
        RunError: if the metrics are damaged.
    """
    path = directory.path
    metrics, traced = read_lines(path / METRICS), read_lines(path / GRADIP)
    _check_rounds(metrics, traced, path)
    if not directory.has_ledger():
        if metrics or traced or (path / SNAPSHOT).exists():
            raise LedgerError(f"{path} has rounds and no {LEDGER}, which is lost; nothing was changed")
        return SavedRounds()
    ledger = read_ledger(path / LEDGER)
    _check_header(ledger.header, header, path / LEDGER)
    # before training there is a line that the ledger has no counterpart of
    rounds = ledger.lines if header.terms.calibration_steps else [None, *ledger.lines]
    last = traced[-1]["round"] + 1 if traced else 0
    if max(len(metrics), last) > len(rounds):
        raise LedgerError(
            f"{path / LEDGER} ends before {METRICS} or {GRADIP}, which are written after it: it has lost rounds; "
            f"nothing was changed"
        )
    for number, (line, done) in enumerate(zip(metrics, rounds, strict=False), 1):
        check_metrics_line(line, done, f"{path / METRICS}, line {number}")
    snapshot = None
    if (path / SNAPSHOT).exists() and not header.terms.sends_weights:
        snapshot = Snapshot.load(path / SNAPSHOT, ledger)
    return SavedRounds(
        ledger=ledger,
        metrics=metrics,
        traced=sum(line["round"] < len(metrics) for line in traced),
        snapshot=snapshot if snapshot is not None and snapshot.round < len(metrics) else None,
    )


def reopen_ledger(directory: RunDirectory, header: LedgerHeader, recorded: SavedRounds) -> LedgerWriter:
    """Opens the ledger behind its last whole line, and takes from the other files what will be written anew."""
    if recorded.ledger is None:
        return directory.new_ledger(header)
    directory.cut(METRICS, len(recorded.metrics))
    directory.cut(GRADIP, recorded.traced)
    return LedgerWriter(directory.path / LEDGER, header, recorded.ledger)


def _check_rounds(metrics: list[Line], traced: list[Line], path: Path) -> None:
    for number, line in enumerate(metrics):
        if line.get("round") != number:
            raise RunError(f"{path / METRICS}, line {number + 1}: expected round {number}; nothing was changed")
    for number, line in enumerate(traced, 1):
        before = traced[number - 2]["round"] if number > 1 else -1
        if not isinstance(line.get("round"), int) or line["round"] <= before:
            raise RunError(f"{path / GRADIP}, line {number}: no round after the line before; nothing was changed")


def _check_header(found: LedgerHeader, wanted: LedgerHeader, path: Path) -> None:
    if found.base != wanted.base:
        raise LedgerError(
            f"{path}, line 1: the run began with a base model of fingerprint {found.base[:12]}; "
            f"this one has {wanted.base[:12]}; nothing was changed"
        )
    if found.terms.mask_digest != wanted.terms.mask_digest:
        raise LedgerError(
            f"{path}, line 1: the run uses the mask {found.terms.mask_digest[:12]}; the one beside it is "
            f"{wanted.terms.mask_digest[:12]}; nothing was changed"
        )
    for mine, theirs in ((found.terms, wanted.terms), (found, wanted)):
        for each in fields(mine):
            a, b = getattr(mine, each.name), getattr(theirs, each.name)
            if a != b:
                raise LedgerError(f"{path}, line 1: {each.name} is {a}; by config.toml it is {b}; nothing was changed")


__all__ = ["SavedRounds", "read_saved_rounds", "reopen_ledger"]
