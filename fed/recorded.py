"""What a run that was stopped left behind, checked before anything is written to it again."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from ..errors import LedgerError, RunError
from .ledger import Header, Ledger, LedgerWriter, Round, read_ledger
from .methods import Gradient
from .rundir import GRADIP, LEDGER, METRICS, SNAPSHOT, Line, RunDirectory
from .snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The rounds on disk; empty for a run that begins.

    Args:
        ledger: None where not even its header is whole.
        metrics: lines of the rounds that the ledger has too, round 0 first.
        snapshot: of one of these rounds, or None.
    """

    ledger: Ledger | None = None
    metrics: list[Line] = field(default_factory=list)
    snapshot: Snapshot | None = None

    @property
    def told(self) -> list[Round]:
        """Rounds of which everything has been written."""
        return [line for line in self._lines if line.round < len(self.metrics)]

    @property
    def untold(self) -> list[Round]:
        """Rounds that are in the ledger, and not yet in the metrics."""
        return [line for line in self._lines if line.round >= len(self.metrics)]

    @property
    def _lines(self) -> list[Round]:
        return self.ledger.lines if self.ledger is not None else []


def read_recorded(directory: RunDirectory, header: Header) -> Recorded:
    """Reads what is in a run directory.

    Args:
        directory: of the run.
        header: that its ledger should have.

    Raises:
        LedgerError: if the ledger is damaged or of another run, or the snapshot is.
        RunError: if the metrics are damaged.
    """
    path = directory.path / LEDGER
    if not directory.has_ledger():
        return Recorded()
    ledger = read_ledger(path)
    _check_header(ledger.header, header, path)
    metrics = directory.lines(METRICS)
    for number, line in enumerate(metrics):
        if line.get("round") != number:
            raise RunError(
                f"{directory.path / METRICS}, line {number + 1}: expected round {number}; nothing was changed"
            )
    before_training = 0 if header.terms.calibration_steps else 1  # a line that the ledger has no counterpart of
    metrics = metrics[: before_training + len(ledger.lines)]
    snapshot = None
    if (directory.path / SNAPSHOT).exists() and header.terms.gradient is not Gradient.BACKPROPAGATION:
        snapshot = Snapshot.load(directory.path / SNAPSHOT, ledger)
    return Recorded(
        ledger=ledger,
        metrics=metrics,
        snapshot=snapshot if snapshot is not None and snapshot.round < len(metrics) else None,
    )


def go_on(directory: RunDirectory, header: Header, recorded: Recorded) -> LedgerWriter:
    """Opens the ledger behind its last whole line, and takes from the other files what goes beyond it."""
    if recorded.ledger is None:
        return directory.new_ledger(header)
    directory.cut(METRICS, len(recorded.metrics))
    traced = [line["round"] for line in directory.lines(GRADIP)]
    directory.cut(GRADIP, sum(round < len(recorded.metrics) for round in traced))
    return LedgerWriter(directory.path / LEDGER, header, recorded.ledger)


def _check_header(found: Header, wanted: Header, path: Path) -> None:
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


__all__ = ["Recorded", "go_on", "read_recorded"]
