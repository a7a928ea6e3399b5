"""The ledger: a header and one line a round, from which base and mask give the fine-tuned model back, bit for bit.

JSON Lines; every line ends in the CRC-32 of what stands before it. fp32 scalars are written as the shortest decimal
that gives the same float64 back, so they survive exactly. The format is described in ``docs/formats.md``.
"""

import base64
import errno
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from .. import stream
from ..errors import LedgerError, RunError
from .methods import Gradient
from .terms import CALIBRATION, Schedule, Terms

FORMAT = "meerkat-ledger/2"
_CRC = ',"crc32":"'


@dataclass(frozen=True, kw_only=True)
class Header:
    """First line of a ledger.

    Args:
        terms: of the federation.
        base: fingerprint of the base model.
        method: name of the method.
        clients: ``K``.
        weighting: how ``p_i`` are made.
    """

    terms: Terms
    base: str
    method: str
    clients: int
    weighting: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Round:
    """One line: what a round did.

    Args:
        round: from 1; 0 is the calibration of virtual-path selection, which moves nothing.
        lr: of each step, [T].
        scalars: aggregated, fp32, one a step and query, [T * queries]; none in round 0 or with ``masters``.
        clients: each client's own scalars, fp32, at most as many.
        stopped: ids of the clients that take one step a round from here on; told in round 0 only.
        masters: float32 [k], where the clients train by backpropagation; else None.
    """

    round: int
    lr: list[float]
    scalars: list[float]
    clients: dict[int, list[float]]
    stopped: list[int] = field(default_factory=list)
    masters: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Round) and self.fields() == other.fields()

    def fields(self) -> dict[str, Any]:
        """As they stand in the file."""
        fields: dict[str, Any] = {
            "round": self.round,
            "lr": self.lr,
            "scalars": self.scalars,
            "clients": {str(i): scalars for i, scalars in self.clients.items()},
        }
        if self.round == CALIBRATION:
            fields["stopped"] = self.stopped
        if self.masters is not None:
            fields["masters"] = base64.b64encode(np.ascontiguousarray(self.masters, "<f4").tobytes()).decode()
        return fields


@dataclass(frozen=True)
class Ledger:
    """A ledger that was read: header and complete rounds; and the calibration line, where there is one."""

    header: Header
    rounds: list[Round]
    calibration: Round | None = None

    def steps(self) -> Iterator[tuple[int, float, float]]:
        """(seed, lr, g) of every update in order, as ``replay`` takes them; ``lr`` is a query's share."""
        terms = self.header.terms
        for line in self.rounds:
            yield from zip(terms.seeds(line.round), terms.shares(line.lr), line.scalars, strict=True)


class LedgerWriter:
    """Writes a new ledger; a line is on disk before ``append`` returns. A context manager, which closes the file.

    Args:
        path: of a file that does not exist yet.
        header: its first line.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._file: BinaryIO = open(path, "xb", buffering=0)  # noqa: SIM115
        terms = header.terms
        self._write(
            {
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
                "weighting": header.weighting,
            }
        )

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
        data = _sealed(fields)
        before = self._file.tell()
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.seek(before)
            self._file.truncate(before)
            raise RunError(
                f"cannot write {self._file.name}: {error.strerror}; the rounds in it are complete"
            ) from error


def read_ledger(path: Path) -> Ledger:
    """Reads a ledger. A torn last line is dropped with a warning.

    Raises:
        LedgerError: for any other damage, naming the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"cannot read the ledger {path}: {error}") from error
    *lines, rest = data.split(b"\n")
    if rest:
        warnings.warn(f"{path}: dropped the torn last line {len(lines) + 1} ({len(rest)} bytes)", stacklevel=2)
    if not lines:
        raise LedgerError(f"{path} has no header")
    header = _header(_opened(lines[0], path, 1), path)
    first = CALIBRATION if header.terms.calibration_steps else 1
    rounds = [
        _round(_opened(line, path, number), path, number, header, number - 2 + first)
        for number, line in enumerate(lines[1:], 2)
    ]
    if rounds and first == CALIBRATION:
        return Ledger(header, rounds[1:], rounds[0])
    return Ledger(header, rounds)


def _sealed(fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields, separators=(",", ":"), allow_nan=False)[:-1]
    return f'{body}{_CRC}{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def _opened(line: bytes, path: Path, number: int) -> dict[str, Any]:
    body, found, crc = line.rpartition(_CRC.encode())
    if not found or crc != f'{zlib.crc32(body):08x}"}}'.encode():
        raise LedgerError(f"{path}, line {number}: the checksum does not match; the ledger is damaged")
    fields = json.loads(body + b"}")
    if not isinstance(fields, dict):
        raise LedgerError(f"{path}, line {number}: not an object")
    return fields


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
            weighting=str(fields["weighting"]),
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
            clients={int(i): [float(g) for g in scalars] for i, scalars in fields["clients"].items()},
            stopped=[int(i) for i in fields["stopped"]] if expected == CALIBRATION else [],
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


def _masters(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")


__all__ = ["FORMAT", "Header", "Ledger", "LedgerWriter", "Round", "read_ledger"]
