"""What server and clients send each other: a 40-byte header and 4-byte values. No weights go up, no code comes down.

header   magic "MKT1", kind, version, flags (bit 0: the loss is known), zero; client, round, local steps, first round
         (request), queries not taken (reply) or where the client stands (behind), number of values, steps before
         (request) or examples (reply) (uint32 each), loss (fp32), CRC-32 of everything else (uint32); little-endian
payload  fp32 values; in a reply, then the positions of the queries that were not taken, uint32

Every message has one encoding: what is decoded encodes to the same bytes, and any other bytes are refused. The format
is described in ``docs/formats.md``.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from .rejection import RejectedError, Rejection

_MAGIC = b"MKT1"
_VERSION = 3
_HEADER = struct.Struct("<4sBBBBIIIIIIfI")
HEADER_BYTES = _HEADER.size
_LOSS_KNOWN = 1
# Values one message may carry: masters of a mask of 268 million elements (1 GiB).
MAX_VALUES = 1 << 28


class _Kind(IntEnum):
    SCALARS = 1  # request: catch up by scalars
    MASTERS = 2  # request: catch up by master values
    REPLY = 3
    MASTERS_REPLY = 4  # of a client that trains by backpropagation: the upper bound, which sends weights
    STALE = 5


_KINDS = {kind.value: kind for kind in _Kind}
_REQUESTS = (_Kind.SCALARS, _Kind.MASTERS)
_WORD, _VALUE = np.dtype("<u4"), np.dtype("<f4")


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Server to client: catch up to the beginning of a round and take some local steps.

    Args:
        client: id of the client it is for.
        round: from 1; 0 asks for the calibration path of virtual-path selection.
        local_steps: steps this client is to take, at most ``T``.
        steps_before: steps it was asked for in earlier rounds, which is where it stands in its data: a client that was
            started anew needs to remember nothing.
        first_round: round of the first of the scalars.
        scalars: float32, the aggregated scalars of rounds ``first_round`` to ``round - 1``, ``T`` each; or None.
        masters: float32 [k], the masked weights at the beginning of ``round``, instead of scalars; or None.
    """

    client: int
    round: int
    local_steps: int
    first_round: int
    steps_before: int = 0
    scalars: np.ndarray | None = None
    masters: np.ndarray | None = None

    def encode(self) -> bytes:
        """The message's bytes."""
        kind, values = (_Kind.SCALARS, self.scalars) if self.masters is None else (_Kind.MASTERS, self.masters)
        assert values is not None
        fields = _Fields(
            kind=kind,
            client=self.client,
            round=self.round,
            local_steps=self.local_steps,
            extra=self.first_round,
            amount=self.steps_before,
        )
        return _sealed(fields, _fp32(values))

    @classmethod
    def decode(cls, data: bytes, max_values: int = MAX_VALUES) -> "TrainRequest":
        """Reads a message.

        Args:
            data: any bytes.
            max_values: values it may carry.

        Raises:
            MessageError: saying what is wrong with it, a ``RejectedError``; nothing else, whatever the bytes.
        """
        fields, words = _opened(data, max_values)
        if fields.kind not in _REQUESTS:
            raise fields.malformed("expected a request, got a reply")
        if fields.loss is not None:
            raise fields.malformed("a request has no loss, this one does")
        if not min(fields.round, 1) <= fields.extra <= fields.round:
            raise fields.malformed(
                f"a request for round {fields.round} cannot bring the scalars from round {fields.extra} on"
            )
        named = {"scalars" if fields.kind is _Kind.SCALARS else "masters": _finite(fields, words)}
        return cls(
            client=fields.client,
            round=fields.round,
            local_steps=fields.local_steps,
            first_round=fields.extra,
            steps_before=fields.amount,
            **named,
        )


@dataclass(frozen=True, kw_only=True)
class Stale:
    """Client to server: it stands at an earlier round than the request begins at, having been started anew.

    Args:
        client: id of the client.
        round: of the request.
        at_round: round at whose beginning the client is.
    """

    client: int
    round: int
    at_round: int

    def encode(self) -> bytes:
        """The message's bytes."""
        fields = _Fields(
            kind=_Kind.STALE, client=self.client, round=self.round, local_steps=0, extra=self.at_round, amount=0
        )
        return _sealed(fields, b"")


@dataclass(kw_only=True, slots=True)  # not frozen: a server makes a hundred thousand a round, in a third of the time
class TrainReply:
    """Client to server: the scalars of its local steps.

    Args:
        client: id of the client.
        round: it answers.
        local_steps: steps asked for.
        scalars: float32, one per step and query, NaN where it was not taken; or None.
        masters: float32 [k], the masked weights after its steps, where it trains by backpropagation; or None.
        examples: the client's number of examples.
        loss: mean training loss over its steps; None where it is not told: no step was taken, or it is private.
    """

    client: int
    round: int
    local_steps: int
    examples: int
    loss: float | None
    scalars: np.ndarray | None = None
    masters: np.ndarray | None = None

    def encode(self) -> bytes:
        """The message's bytes."""
        if self.masters is not None:
            kind, payload, skipped = _Kind.MASTERS_REPLY, _fp32(self.masters), 0
        else:
            assert self.scalars is not None
            missing = np.isnan(self.scalars)
            positions = np.flatnonzero(missing).astype("<u4")
            kind, skipped = _Kind.REPLY, len(positions)
            payload = _fp32(np.where(missing, np.float32(0), self.scalars)) + positions.tobytes()
        fields = _Fields(
            kind=kind,
            client=self.client,
            round=self.round,
            local_steps=self.local_steps,
            extra=skipped,
            amount=self.examples,
            loss=self.loss,
        )
        return _sealed(fields, payload)

    @classmethod
    def decode(cls, data: bytes, max_values: int = MAX_VALUES) -> "TrainReply":
        """Reads a message.

        Args:
            data: any bytes.
            max_values: values it may carry, the positions of queries that were not taken among them.

        Raises:
            MessageError: saying what is wrong with it, a ``RejectedError``; nothing else, whatever the bytes.
        """
        reply = decode_answer(data, max_values)
        if isinstance(reply, Stale):
            raise RejectedError(
                Rejection.STALE, f"client {reply.client} stands at round {reply.at_round}", reply.client
            )
        return reply

    @classmethod
    def _of(cls, fields: "_Fields", words: np.ndarray) -> "TrainReply":
        if fields.kind is _Kind.MASTERS_REPLY and fields.extra:
            raise fields.malformed(f"{fields.extra} queries were not taken, and backpropagation has none")
        values = _with_gaps(fields, words)
        by_scalars = fields.kind is _Kind.REPLY
        return cls(
            client=fields.client,
            round=fields.round,
            local_steps=fields.local_steps,
            examples=fields.amount,
            loss=fields.loss,
            scalars=values if by_scalars else None,
            masters=None if by_scalars else values,
        )


def decode_answer(data: bytes, max_values: int = MAX_VALUES) -> TrainReply | Stale:
    """Reads what a client may answer a request with; arguments and errors are those of ``TrainReply.decode``."""
    fields, words = _opened(data, max_values)
    if fields.kind in _REQUESTS:
        raise fields.malformed("expected a reply, got a request")
    if fields.kind is not _Kind.STALE:
        return TrainReply._of(fields, words)
    if fields.local_steps or fields.amount or fields.loss is not None or len(words):
        raise fields.malformed("who is behind has no steps, examples, loss or values to tell of, this message does")
    if not 1 <= fields.extra < fields.round:
        raise fields.malformed(f"who is asked for round {fields.round} cannot be behind at round {fields.extra}")
    return Stale(client=fields.client, round=fields.round, at_round=fields.extra)


class _Fields(NamedTuple):
    """A header, less what follows from the payload; ``extra`` is the number at offset 20, ``amount`` that at 28."""

    kind: _Kind
    client: int
    round: int
    local_steps: int
    extra: int
    amount: int
    loss: float | None = None

    def malformed(self, text: str) -> RejectedError:
        return RejectedError(Rejection.MALFORMED, text, self.client)


def _fp32(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def _sealed(fields: _Fields, payload: bytes) -> bytes:
    known = fields.loss is not None
    unsigned = _HEADER.pack(
        _MAGIC,
        fields.kind,
        _VERSION,
        _LOSS_KNOWN if known else 0,
        0,
        fields.client,
        fields.round,
        fields.local_steps,
        fields.extra,
        len(payload) // 4,
        fields.amount,
        fields.loss if known else 0.0,
        0,
    )[:-4]
    return unsigned + struct.pack("<I", zlib.crc32(payload, zlib.crc32(unsigned))) + payload


def _opened(data: bytes, max_values: int) -> tuple[_Fields, np.ndarray]:
    """Header and payload, uint32; the cheap checks first."""
    if len(data) < HEADER_BYTES:
        raise RejectedError(Rejection.MALFORMED, f"the message has {len(data)} bytes, a header {HEADER_BYTES}")
    magic, kind, version, flags, zero, client, round, steps, extra, count, amount, loss, crc = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise RejectedError(
            Rejection.MALFORMED,
            f"the message begins {magic!r}, version {version}; expected {_MAGIC!r}, version {_VERSION}",
        )
    if count > max_values:
        raise RejectedError(Rejection.MALFORMED, f"the message claims {count} values where at most {max_values} belong")
    if len(data) != HEADER_BYTES + 4 * count:
        raise RejectedError(Rejection.MALFORMED, f"the message has {len(data)} bytes and claims {count} values")
    if zlib.crc32(memoryview(data)[HEADER_BYTES:], zlib.crc32(data[: HEADER_BYTES - 4])) != crc:
        raise RejectedError(Rejection.MALFORMED, "the message's checksum does not match: it was damaged on the way")
    if kind not in _KINDS:
        raise RejectedError(Rejection.MALFORMED, f"unknown kind of message {kind}", client)
    if zero or flags & ~_LOSS_KNOWN:
        raise RejectedError(
            Rejection.MALFORMED, f"reserved bits are set (flags {flags:#04x}, then {zero:#04x})", client
        )
    if not flags and data[HEADER_BYTES - 8 : HEADER_BYTES - 4] != bytes(4):
        raise RejectedError(Rejection.MALFORMED, f"the loss is {loss} in a message that tells none", client)
    if not math.isfinite(loss):
        raise RejectedError(Rejection.NOT_FINITE, f"the loss is {loss}", client)
    fields = _Fields(_KINDS[kind], client, round, steps, extra, amount, loss if flags else None)
    return fields, np.frombuffer(data, _WORD, -1, HEADER_BYTES)


def _finite(fields: _Fields, words: np.ndarray) -> np.ndarray:
    """Words as fp32 values, each finite."""
    values = words.view(_VALUE)
    finite = np.isfinite(values)
    if np.count_nonzero(finite) < len(values):  # of few values in half the time of all()
        at = int(np.flatnonzero(~finite)[0])
        raise RejectedError(Rejection.NOT_FINITE, f"value {at} is not finite ({values[at]})", fields.client)
    return values


def _with_gaps(fields: _Fields, words: np.ndarray) -> np.ndarray:
    """A reply's values, NaN at the positions that follow them."""
    if not fields.extra:
        return _finite(fields, words)
    count = len(words) - fields.extra
    if fields.extra > count:
        raise fields.malformed(f"{fields.extra} of {len(words)} values are said to be positions of the others")
    values, positions = _finite(fields, words[:count]), words[count:]
    if (positions >= count).any() or (positions[1:] <= positions[:-1]).any():
        raise fields.malformed(f"the positions of queries not taken must ascend, without repetition, below {count}")
    if words[positions].any():
        raise fields.malformed("a query that was not taken has a scalar other than 0")
    values = values.copy()
    values[positions] = np.nan
    return values


__all__ = ["HEADER_BYTES", "MAX_VALUES", "Stale", "TrainReply", "TrainRequest", "decode_answer"]
