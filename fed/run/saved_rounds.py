"""Reads and checks the rounds in the directory of a run that was stopped, before anything more is written to it."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from ...engine.errors import LedgerError, RunError
from ...engine.lm.scores import scores_in
from ..ledger.file import Ledger, LedgerHeader, LedgerWriter, RoundRecord, read_ledger
from ..ledger.snapshot import Snapshot
from .directory import GRADIP, LEDGER, METRICS, SNAPSHOT, RunDirectory
from .gradip_file import read_gradip
from .jsonl import Line, read_lines
from .metrics import check_metrics_line


@dataclass(frozen=True, kw_only=True)
class SavedRounds:
    """The rounds in a run directory; empty for a new run.

    Args:
        ledger: the ledger; None if there is none or its header is incomplete.
        metrics: lines of ``metrics.jsonl``, round 0 first.
        traced: number of lines of ``gradip.jsonl`` that belong to rounds in ``metrics``; they are of the first rounds.
        snapshot: the snapshot, if there is one and its round is in ``metrics``; else None.
    """

    ledger: Ledger | None = None
    metrics: list[Line] = field(default_factory=list)
    traced: int = 0
    snapshot: Snapshot | None = None

    @property
    def complete(self) -> list[RoundRecord]:
        """Rounds of which everything has been written, ledger and metrics."""
        return [line for line in self._lines if line.round < len(self.metrics)]

    @property
    def pending(self) -> list[RoundRecord]:
        """Rounds that are in the ledger but not in the metrics yet."""
        return [line for line in self._lines if line.round >= len(self.metrics)]

    def crc_of(self, record: RoundRecord) -> int:
        """CRC-32 of a round's line in the ledger."""
        assert self.ledger is not None
        return self.ledger.crcs[1 + record.round - self.ledger.lines[0].round]

    @property
    def _lines(self) -> list[RoundRecord]:
        return self.ledger.lines if self.ledger is not None else []


def read_saved_rounds(directory: RunDirectory, header: LedgerHeader) -> SavedRounds:
    """Reads and checks the rounds in a run directory.

    Args:
        directory: the run directory.
        header: the header that the ledger should have.

    Raises:
        LedgerError: if ledger or snapshot is damaged or belongs to another run.
        RunError: if ``metrics.jsonl`` or ``gradip.jsonl`` is damaged.
    """
    path = directory.path
    metrics = read_lines(path / METRICS)
    _check_round_numbers(metrics, path)
    if not directory.has_ledger():
        if metrics or read_gradip(path, None) or (path / SNAPSHOT).exists():
            raise LedgerError(f"{path} has rounds but no {LEDGER}, so it was lost; nothing was changed")
        return SavedRounds()
    ledger = read_ledger(path / LEDGER)
    _check_header(ledger.header, header, path / LEDGER)
    # The ledger's line of each line of the metrics. Without calibration, the line of round 0 has none.
    records = ledger.lines if header.terms.calibration_steps else [None, *ledger.lines]
    if len(metrics) > len(records):
        raise LedgerError(
            f"{path / LEDGER} ends before {METRICS}, which is written after it: it has lost rounds; nothing was changed"
        )
    gradip = read_gradip(path, ledger)
    for number, (line, record) in enumerate(zip(metrics, records, strict=False), 1):
        check_metrics_line(line, record, f"{path / METRICS}, line {number}", scores_in(metrics[0]))
    snapshot = None
    if (path / SNAPSHOT).exists() and not header.terms.sends_weights:
        snapshot = Snapshot.load(path / SNAPSHOT, ledger)
    return SavedRounds(
        ledger=ledger,
        metrics=metrics,
        traced=sum(line["round"] < len(metrics) for line in gradip),
        snapshot=snapshot if snapshot is not None and snapshot.round < len(metrics) else None,
    )


def reopen_ledger(directory: RunDirectory, header: LedgerHeader, saved: SavedRounds) -> LedgerWriter:
    """Opens the ledger to append after its last complete line, or creates it.

    Lines of ``metrics.jsonl`` and ``gradip.jsonl`` that will be written again are removed.

    Args:
        directory: the run directory.
        header: the header of the ledger.
        saved: the rounds in the directory.
    """
    if saved.ledger is None:
        return directory.create_ledger(header)
    directory.truncate_lines(METRICS, len(saved.metrics))
    directory.truncate_lines(GRADIP, saved.traced)
    return LedgerWriter(directory.path / LEDGER, header, saved.ledger)


def _check_round_numbers(metrics: list[Line], path: Path) -> None:
    """Checks that rounds count from 0 in the metrics."""
    for number, line in enumerate(metrics):
        if line.get("round") != number:
            raise RunError(f"{path / METRICS}, line {number + 1}: expected round {number}; nothing was changed")


def _check_header(header: LedgerHeader, expected: LedgerHeader, path: Path) -> None:
    """Raises ``LedgerError`` if the header of the ledger at ``path`` is not the expected one."""
    if header.base != expected.base:
        raise LedgerError(
            f"{path}, line 1: the run started from a base model with fingerprint {header.base[:12]}; "
            f"this model has {expected.base[:12]}; nothing was changed"
        )
    if header.terms.mask_digest != expected.terms.mask_digest:
        raise LedgerError(
            f"{path}, line 1: the run uses the mask {header.terms.mask_digest[:12]}; the mask file in its directory is "
            f"{expected.terms.mask_digest[:12]}; put the right one back, or delete it; nothing was changed"
        )
    for part, expected_part in ((header.terms, expected.terms), (header, expected)):
        for field_ in fields(part):
            value, expected_value = getattr(part, field_.name), getattr(expected_part, field_.name)
            if value != expected_value:
                raise LedgerError(
                    f"{path}, line 1: {field_.name} is {value}; by config.toml it is {expected_value}; "
                    f"nothing was changed"
                )


__all__ = ["SavedRounds", "read_saved_rounds", "reopen_ledger"]
