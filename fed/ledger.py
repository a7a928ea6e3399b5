"""The ledger: a header and one line a round, from which base and mask give the fine-tuned model back, bit for bit.

JSON Lines; every line ends in a CRC-32 over itself and, through theirs, all lines before it. fp32 scalars are written
as the shortest decimal that gives the same float64 back, so they survive exactly. ``docs/formats.md`` has the format.
"""

import base64
import json
import math
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from .. import stream
from ..errors import LedgerError, RunError
from ..files import append_whole, sync_directory
from .aggregation import Aggregation, Rule, Weighting
from .methods import Gradient
from .selection import Thresholds
from .terms import CALIBRATION, Schedule, Terms

FORMAT = "meerkat-ledger/3"
_CRC = ',"crc32":"'
_SEAL = re.compile(rb',"crc32":"[0-9a-f]{8}"}')


@dataclass(frozen=True, kw_only=True)
class Header:
    """First line of a ledger.

    Args:
        terms: of the federation.
        base: fingerprint of the base model.
        method: name of the method.
        clients: ``K``.
        aggregation: how a round is made of the clients' answers.
    """

    terms: Terms
    base: str
    method: str
    clients: int
    aggregation: Aggregation


@dataclass(frozen=True, kw_only=True, eq=False)
class Round:
    """One line: what a round did.

    Args:
        round: from 1; 0 is the calibration of virtual-path selection, which moves nothing.
        lr: of each step, [T].
        scalars: aggregated, fp32, one a step and query, [T * queries]; none in round 0 or with ``masters``.
        clients: each client's own scalars, fp32, at most as many; NaN where a step was not taken.
        examples: number of examples of the clients that told theirs for the first time.
        loss: mean training loss of the clients, weighted by ``p_i``; None if none told it.
        steps: local steps that the clients answered for, in all.
        bytes_up: of all messages from clients.
        bytes_down: of all messages to clients.
        rejected: messages refused, by client and reason.
        stopped: ids of the clients that take one step a round from here on; told in round 0 only.
        thresholds: by which they were found; told in round 0 only.
        masters: float32 [k], where the clients train by backpropagation; else None.
    """

    round: int
    lr: list[float]
    scalars: list[float]
    clients: dict[int, list[float]]
    examples: dict[int, int] = field(default_factory=dict)
    loss: float | None = None
    steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    stopped: list[int] = field(default_factory=list)
    thresholds: Thresholds | None = None
    masters: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Round) and self.fields() == other.fields()

    def fields(self) -> dict[str, Any]:
        """As they stand in the file."""
        fields: dict[str, Any] = {
            "round": self.round,
            "lr": self.lr,
            "scalars": self.scalars,
            "clients": {str(i): [None if math.isnan(g) else g for g in own] for i, own in self.clients.items()},
            "examples": {str(i): count for i, count in self.examples.items()},
            "loss": self.loss,
            "steps": self.steps,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "rejected": self.rejected,
        }
        if self.round == CALIBRATION:
            fields["stopped"] = self.stopped
            fields["thresholds"] = None if self.thresholds is None else vars(self.thresholds)
        if self.masters is not None:
            fields["masters"] = base64.b64encode(np.ascontiguousarray(self.masters, "<f4").tobytes()).decode()
        return fields


@dataclass(frozen=True)
class Ledger:
    """A ledger that was read.

    Args:
        header: its first line.
        lines: of its complete rounds, round 0 included where there is a calibration.
        seals: the CRC-32 of the header and of each of them.
        ends: where the header and each of them end in the file, in bytes.
    """

    header: Header
    lines: list[Round]
    seals: list[int]
    ends: list[int]

    @property
    def calibration(self) -> Round | None:
        """Round 0, where there is one."""
        return self.lines[0] if self.lines and self.lines[0].round == CALIBRATION else None

    @property
    def rounds(self) -> list[Round]:
        """The rounds from 1 on."""
        return self.lines[1:] if self.calibration is not None else self.lines

    def seal_of(self, round: int) -> int | None:
        """The CRC-32 of a round's line; None if it is not there."""
        return next((seal for line, seal in zip(self.lines, self.seals[1:], strict=True) if line.round == round), None)

    def bytes_of(self, first: int, last: int) -> int:
        """Length in the file of some rounds, both ends included."""
        at = {line.round: number for number, line in enumerate(self.lines, 1)}
        return self.ends[at[last]] - self.ends[at[first] - 1]

    def steps(self) -> Iterator[tuple[int, float, float]]:
        """(seed, lr, g) of every update in order, as ``replay`` takes them; ``lr`` is a query's share."""
        terms = self.header.terms
        for line in self.rounds:
            yield from zip(terms.seeds(line.round), terms.shares(line.lr), line.scalars, strict=True)


class LedgerWriter:
    """Writes a ledger; a line is on disk before ``append`` returns. A context manager, which closes the file.

    Args:
        path: of a file that does not exist yet; or, with ``after``, of the ledger that was read.
        header: its first line.
        after: what is in it already; a torn line after that is cut off.
    """

    def __init__(self, path: Path, header: Header, after: Ledger | None = None) -> None:
        self._file: BinaryIO = open(path, "r+b" if after else "xb", buffering=0)  # noqa: SIM115
        if after is not None:
            self.seal = after.seals[-1]
            self._file.truncate(after.ends[-1])
            return
        self.seal = 0
        self._write(_header_fields(header))
        sync_directory(path.parent)

    def append(self, line: Round) -> None:
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
            append_whole(self._file, data)
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
    header, lines, seals, ends = _header(fields, path), [], [seal], [len(texts[0]) + 1]
    first = CALIBRATION if header.terms.calibration_steps else 1
    for number, text in enumerate(texts[1:], 2):
        fields, seal = _opened(text, seals[-1], path, number)
        lines.append(_round(fields, path, number, header, number - 2 + first))
        seals.append(seal)
        ends.append(ends[-1] + len(text) + 1)
    return Ledger(header, lines, seals, ends)


def _sealed(fields: dict[str, Any], before: int) -> tuple[bytes, int]:
    """A line, and its CRC-32 continued from the line before it."""
    body = json.dumps(fields, separators=(",", ":"), allow_nan=False)[:-1]
    seal = zlib.crc32(body.encode(), before)
    return f'{body}{_CRC}{seal:08x}"}}\n'.encode(), seal


def _opened(line: bytes, before: int, path: Path, number: int) -> tuple[dict[str, Any], int]:
    body, found, crc = line.rpartition(_CRC.encode())
    seal = zlib.crc32(body, before)
    if not found or crc != f'{seal:08x}"}}'.encode():
        raise LedgerError(
            f"{path}, line {number}: the checksum does not match; this line is damaged or not the one that was "
            f"written after the lines before it"
        )
    try:
        fields = json.loads(body + b"}")
    except ValueError as error:
        raise LedgerError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise LedgerError(f"{path}, line {number}: not an object")
    return fields, seal


def _header_fields(header: Header) -> dict[str, Any]:
    terms = header.terms
    return {
        "format": FORMAT,
        "stream_version": stream.VERSION,
        "seed": terms.seed,
        "eps": terms.eps,
        "lr": terms.lr,
        "schedule": terms.schedule,
        "rounds": terms.rounds,
        "local_steps": terms.local_steps,
        "queries": terms.queries,
        "gradient": terms.gradient,
        "calibration_steps": terms.calibration_steps,
        "elements": terms.elements,
        "mask": terms.mask_digest,
        "base": header.base,
        "method": header.method,
        "clients": header.clients,
        "aggregation": vars(header.aggregation),
    }


def _header(fields: dict[str, Any], path: Path) -> Header:
    if fields.get("format") != FORMAT:
        raise LedgerError(f"{path}, line 1: format {fields.get('format')!r}; this version reads {FORMAT!r}")
    if fields.get("stream_version") != stream.VERSION:
        raise LedgerError(
            f"{path}, line 1: stream version {fields.get('stream_version')!r}; this version makes {stream.VERSION}"
        )
    try:
        terms = Terms(
            seed=stream.check_seed(fields["seed"]),
            eps=float(fields["eps"]),
            lr=float(fields["lr"]),
            schedule=Schedule(fields["schedule"]),
            rounds=int(fields["rounds"]),
            local_steps=int(fields["local_steps"]),
            queries=int(fields["queries"]),
            gradient=Gradient(fields["gradient"]),
            calibration_steps=int(fields["calibration_steps"]),
            elements=int(fields["elements"]),
            mask_digest=str(fields["mask"]),
        )
        return Header(
            terms=terms,
            base=str(fields["base"]),
            method=str(fields["method"]),
            clients=int(fields["clients"]),
            aggregation=_aggregation(fields["aggregation"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"{path}, line 1: damaged header ({error!r})") from error


def _round(fields: dict[str, Any], path: Path, number: int, header: Header, expected: int) -> Round:
    terms = header.terms
    try:
        line = Round(
            round=int(fields["round"]),
            lr=[float(value) for value in fields["lr"]],
            scalars=[float(value) for value in fields["scalars"]],
            clients={
                int(i): [math.nan if g is None else float(g) for g in own] for i, own in fields["clients"].items()
            },
            examples={int(i): int(count) for i, count in fields["examples"].items()},
            loss=None if fields["loss"] is None else float(fields["loss"]),
            steps=int(fields["steps"]),
            bytes_up=int(fields["bytes_up"]),
            bytes_down=int(fields["bytes_down"]),
            rejected={str(reason): int(count) for reason, count in fields["rejected"].items()},
            stopped=[int(i) for i in fields["stopped"]] if expected == CALIBRATION else [],
            thresholds=_thresholds(fields["thresholds"]) if expected == CALIBRATION else None,
            masters=_masters(fields["masters"]) if terms.gradient is Gradient.BACKPROPAGATION else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LedgerError(f"{path}, line {number}: damaged round ({error!r})") from error
    if line.round != expected:
        raise LedgerError(f"{path}, line {number}: holds round {line.round} where round {expected} belongs")
    steps = terms.steps(expected)
    values = 0 if expected == CALIBRATION or line.masters is not None else terms.values
    most = steps * terms.queries
    if len(line.lr) != steps or len(line.scalars) != values or any(len(g) > most for g in line.clients.values()):
        raise LedgerError(f"{path}, line {number}: expected {steps} learning rates and {values} scalars")
    if line.masters is not None and len(line.masters) != terms.elements:
        raise LedgerError(f"{path}, line {number}: {len(line.masters)} master values for {terms.elements} elements")
    masters = () if line.masters is None else line.masters.tolist()
    if not all(map(math.isfinite, (*line.lr, *line.scalars, *masters))):
        raise LedgerError(f"{path}, line {number}: a scalar or learning rate is not finite")
    return line


def _aggregation(fields: dict[str, Any]) -> Aggregation:
    typed = {"rule": Rule(fields["rule"]), "weighting": Weighting(fields["weighting"])}
    return Aggregation(**{**fields, **typed})


def _thresholds(fields: dict[str, float] | None) -> Thresholds | None:
    return None if fields is None else Thresholds(**{name: float(value) for name, value in fields.items()})


def _masters(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")


__all__ = ["FORMAT", "Header", "Ledger", "LedgerWriter", "Round", "read_ledger"]
