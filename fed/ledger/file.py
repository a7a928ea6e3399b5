"""The ledger: a header and one line a round, from which base and mask give the fine-tuned model back, bit for bit.

JSON Lines; every line ends in a CRC-32 over itself and, through theirs, all lines before it. fp32 scalars are written
as the shortest decimal that gives the same float64 back, so they survive exactly. ``docs/formats.md`` has the format.
"""

import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from ...engine.atomic_files import append_fsync, sync_directory
from ...engine.errors import LedgerError, RunError
from ..scalars import ClientScalars
from ..terms import CALIBRATION
from .lines import FORMAT, LedgerHeader, RoundRecord, client_scalars_json, parse_header, parse_round

_CRC = b',"crc32":"'
_SEAL = re.compile(rb',"crc32":"[0-9a-f]{8}"}')


@dataclass(frozen=True)
class Ledger:
    """A ledger that was read.

    Args:
        header: its first line.
        lines: of its complete rounds, round 0 included where there is a calibration.
        seals: the CRC-32 of the header and of each of them.
        ends: where the header and each of them end in the file, in bytes.
        digest: SHA-256 of the file, in hexadecimal.
    """

    header: LedgerHeader
    lines: list[RoundRecord]
    seals: list[int]
    ends: list[int]
    digest: str

    @property
    def calibration(self) -> RoundRecord | None:
        """Round 0, where there is one."""
        return self.lines[0] if self.lines and self.lines[0].round == CALIBRATION else None

    @property
    def rounds(self) -> list[RoundRecord]:
        """The rounds from 1 on."""
        return self.lines[1:] if self.calibration is not None else self.lines

    def seal_of(self, round: int) -> int | None:
        """The CRC-32 of a round's line; None if it is not there."""
        return next((seal for line, seal in zip(self.lines, self.seals[1:], strict=True) if line.round == round), None)

    def byte_length(self, first: int, last: int) -> int:
        """Length in the file of some rounds, both ends included."""
        at = {line.round: number for number, line in enumerate(self.lines, 1)}
        return self.ends[at[last]] - self.ends[at[first] - 1]

    def updates(self, last: int | None = None) -> Iterator[tuple[int, float, float]]:
        """(seed, lr, g) of the updates in order, as ``replay`` takes them; ``lr`` is a query's share.

        Args:
            last: round to stop after; None is the ledger's last.
        """
        for line in self.rounds[:last]:
            yield from self.header.terms.updates(line.round, line.scalars)


class LedgerWriter:
    """Writes a ledger; a line is on disk before ``append`` returns. A context manager, which closes the file.

    Args:
        path: of a file that does not exist yet; or, with ``after``, of the ledger that was read.
        header: its first line.
        after: what is in it already; a torn line after that is cut off.
    """

    def __init__(self, path: Path, header: LedgerHeader, after: Ledger | None = None) -> None:
        self._file: BinaryIO = open(path, "r+b" if after else "xb", buffering=0)  # noqa: SIM115
        if after is not None:
            self.seal = after.seals[-1]
            self._file.truncate(after.ends[-1])
            return
        self.seal = 0
        self._write(header.fields())
        sync_directory(path.parent)

    def append(self, line: RoundRecord) -> None:
        """Writes and fsyncs one round.

        Raises:
            RunError: if that fails; what was written of the round has been taken back.
        """
        self._write(line.fields())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, fields: dict[str, Any]) -> None:
        data, seal = _sealed(fields, self.seal)
        try:
            append_fsync(self._file, data)
        except OSError as error:
            raise RunError(
                f"cannot write {self._file.name}: {error.strerror}; the rounds in it are complete"
            ) from error
        self.seal = seal


def read_ledger(path: Path) -> Ledger:
    """Reads a ledger. A torn last line is dropped with a warning.

    Raises:
        LedgerError: for any other damage, naming the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"cannot read the ledger {path}: {error.strerror}") from error
    *texts, rest = data.split(b"\n")
    if rest:
        if _SEAL.search(rest, 0, len(rest) - 1):  # a write that was cut short ends with its seal at the latest
            raise LedgerError(f"{path}, line {len(texts) + 1}: the line does not end where it should; it is damaged")
        warnings.warn(f"{path}: dropped the torn last line {len(texts) + 1} ({len(rest)} bytes)", stacklevel=2)
    if not texts:
        raise LedgerError(f"{path} has no header")
    fields, seal = _opened(texts[0], 0, path, 1)
    header, lines, seals, ends = parse_header(fields, path), [], [seal], [len(texts[0]) + 1]
    first = CALIBRATION if header.terms.calibration_steps else 1
    for number, text in enumerate(texts[1:], 2):
        fields, seal = _opened(text, seals[-1], path, number)
        lines.append(parse_round(fields, path, number, header, number - 2 + first))
        seals.append(seal)
        ends.append(ends[-1] + len(text) + 1)
    return Ledger(header, lines, seals, ends, hashlib.sha256(data).hexdigest())


def _sealed(fields: dict[str, Any], before: int) -> tuple[bytes, int]:
    """A line, and its CRC-32 continued from the line before it."""
    body = b"{" + b",".join(b"%b:%b" % (_json(name), _json(value)) for name, value in fields.items())
    seal = zlib.crc32(body, before)
    return b'%b%b%08x"}\n' % (body, _CRC, seal), seal


def _json(value: Any) -> bytes:
    if isinstance(value, ClientScalars):
        return client_scalars_json(value)
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _opened(line: bytes, before: int, path: Path, number: int) -> tuple[dict[str, Any], int]:
    body, found, crc = line.rpartition(_CRC)
    seal = zlib.crc32(body, before)
    if not found or crc != f'{seal:08x}"}}'.encode():
        raise LedgerError(
            f"{path}, line {number}: the checksum does not match; this line is damaged or not the one that was "
            f"written after the lines before it"
        )
    try:
        fields = json.loads(body + b"}")
    except (ValueError, RecursionError) as error:
        raise LedgerError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise LedgerError(f"{path}, line {number}: not an object")
    return fields, seal


__all__ = ["FORMAT", "Ledger", "LedgerHeader", "LedgerWriter", "RoundRecord", "read_ledger"]
