"""The ledger file: a header and one line a round. With base model and mask, it reproduces the fine-tuned model exactly.

The format is JSON Lines. Every line ends in a CRC-32 that is continued from the CRC-32 of the line before, so it covers
all lines up to this one. fp32 scalars are written as the shortest decimal that reads back as the same float64, so they
are preserved exactly. ``docs/formats.md`` describes the format.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from ...engine.atomic_files import append_fsync, sync_directory
from ...engine.errors import LedgerError, RunError
from ..terms import CALIBRATION
from .lines import FORMAT, LedgerHeader, RoundRecord, parse_header, parse_round
from .sealed_lines import decode_line, encode_line

_COMPLETE_END = re.compile(rb',"crc32":"[0-9a-f]{8}"}')


@dataclass(frozen=True)
class Ledger:
    """The content of a ledger file.

    Args:
        header: the first line.
        lines: the lines of the complete rounds, including round 0 if there is a calibration.
        crcs: CRC-32 of the header and of each of ``lines``.
        ends: position in the file, in bytes, at which the header and each of ``lines`` end.
        digest: SHA-256 of the file, in hexadecimal.
    """

    header: LedgerHeader
    lines: list[RoundRecord]
    crcs: list[int]
    ends: list[int]
    digest: str

    @property
    def calibration(self) -> RoundRecord | None:
        """The line of round 0; None if there is no calibration."""
        return self.lines[0] if self.lines and self.lines[0].round == CALIBRATION else None

    @property
    def rounds(self) -> list[RoundRecord]:
        """The lines of the rounds from 1 on."""
        return self.lines[1:] if self.calibration is not None else self.lines

    def crc_of(self, round: int) -> int | None:
        """CRC-32 of a round's line; None if the ledger does not have the round."""
        return next((crc for line, crc in zip(self.lines, self.crcs[1:], strict=True) if line.round == round), None)

    def byte_length(self, first: int, last: int) -> int:
        """Number of bytes in the file of the rounds from ``first`` to ``last``, inclusive."""
        index = {line.round: number for number, line in enumerate(self.lines, 1)}
        return self.ends[index[last]] - self.ends[index[first] - 1]

    def updates(self, last: int | None = None) -> Iterator[tuple[int, float, float]]:
        """Yields all updates in order as ``(seed, lr, g)``, in the format of ``replay``; see ``Terms.updates``.

        Args:
            last: last round to yield; None: the ledger's last.
        """
        for line in self.rounds[:last]:
            yield from self.header.terms.updates(line.round, line.scalars)


class LedgerWriter:
    """Writes a ledger. A line is on disk (fsync) before ``append`` returns.

    A context manager, which closes the file.

    Args:
        path: path of the file. It must not exist; with ``after``, it is the path from which that ledger was read.
        header: first line of a new file.
        after: content of an existing file to continue. An incomplete last line in the file is removed.

    Raises:
        FileExistsError: if the file exists and ``after`` is None.
        RunError: if the header cannot be written.
    """

    def __init__(self, path: Path, header: LedgerHeader, after: Ledger | None = None) -> None:
        self._file: BinaryIO = open(path, "r+b" if after else "xb", buffering=0)  # noqa: SIM115
        if after is not None:
            last_round = after.lines[-1].round if after.lines else None
            self._last: tuple[int | None, int, int] = (
                last_round,
                after.crcs[-1],
                after.ends[-1],
            )  # of the last line; it ends there in the file
            self._file.truncate(after.ends[-1])
            return
        self._last = None, 0, 0
        self._write(None, header.fields())
        sync_directory(path.parent)

    @property
    def crc(self) -> int:
        """CRC-32 of the last line."""
        return self._last[1]

    @property
    def round(self) -> int | None:
        """Round of the last line; None if it is the header."""
        return self._last[0]

    def append(self, line: RoundRecord) -> None:
        """Writes and fsyncs the line of one round. If this is interrupted, the next call replaces the line.

        Raises:
            RunError: if this fails; an incompletely written line is removed again.
        """
        self._write(line.round, line.fields())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, round: int | None, fields: dict[str, Any]) -> None:
        _, previous_crc, end = self._last
        data, crc = encode_line(fields, previous_crc)
        try:
            if self._file.seek(0, os.SEEK_END) > end:  # a line whose writing was interrupted
                self._file.truncate(end)
            append_fsync(self._file, data)
        except OSError as error:
            raise RunError(
                f"cannot write {self._file.name}: {error.strerror}; the rounds written before are complete"
            ) from error
        self._last = round, crc, end + len(data)


def read_ledger(path: Path) -> Ledger:
    """Reads a ledger. A torn last line (without its newline) is dropped with a warning.

    Raises:
        LedgerError: if the file cannot be read, or is damaged in any other way; the error names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"cannot read the ledger {path}: {error.strerror}") from error
    *texts, rest = data.split(b"\n")
    if rest:
        if _COMPLETE_END.search(rest, 0, len(rest) - 1):  # a write that was cut short has nothing after its CRC-32
            raise LedgerError(f"{path}, line {len(texts) + 1}: the line continues after its checksum; it is damaged")
        warnings.warn(f"{path}: dropped the torn last line {len(texts) + 1} ({len(rest)} bytes)", stacklevel=2)
    if not texts:
        raise LedgerError(f"the ledger {path} has no header")
    fields, crc = decode_line(texts[0], 0, f"{path}, line 1", LedgerError)
    header, lines, crcs, ends = parse_header(fields, path), [], [crc], [len(texts[0]) + 1]
    first = CALIBRATION if header.terms.calibration_steps else 1
    for number, text in enumerate(texts[1:], 2):
        fields, crc = decode_line(text, crcs[-1], f"{path}, line {number}", LedgerError)
        lines.append(parse_round(fields, path, number, header, number - 2 + first))
        crcs.append(crc)
        ends.append(ends[-1] + len(text) + 1)
    return Ledger(header, lines, crcs, ends, hashlib.sha256(data).hexdigest())


__all__ = ["FORMAT", "Ledger", "LedgerHeader", "LedgerWriter", "RoundRecord", "read_ledger"]
