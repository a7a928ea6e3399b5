"""Messages between server and clients: a 40-byte header and 4-byte values, never code.

header   magic "MKT1", kind, version, flags (bit 0: the loss is present), zero; then as uint32: client, round, local
         steps, first round (request) or number of skipped queries (reply) or the client's round (stale), number of
         values, steps before (request) or examples (reply); then loss (fp32), CRC-32 of everything else (uint32)
payload  fp32 values; in a reply they are followed by the positions of the skipped queries, uint32

All numbers are little-endian. The values are scalars, except in two cases, where they are the k masked weights
(masters): with clients that train by backpropagation, and in requests where the masters are smaller than the scalars of
the missed rounds.

Every message has exactly one encoding: a decoded message encodes to the same bytes, and any other bytes are rejected.
``docs/formats.md`` describes the format.
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
_HAS_LOSS = 1  # bit of the flags
# Maximum number of values in a message: the masters of a mask of 268 million elements (1 GiB).
MAX_VALUES = 1 << 28


class _Kind(IntEnum):
    SCALARS = 1  # request: catch up by scalars
    MASTERS = 2  # request: catch up by master values
    REPLY = 3
    MASTERS_REPLY = 4  # from a client that trains by backpropagation (fedavg) and therefore sends weights
    STALE = 5


_KINDS = {kind.value: kind for kind in _Kind}
_REQUESTS = (_Kind.SCALARS, _Kind.MASTERS)
_UINT32, _FP32 = np.dtype("<u4"), np.dtype("<f4")


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Message from server to client: catch up to the beginning of a round, then take some local steps.

    Args:
        client: id of the receiving client.
        round: number of the round, from 1; 0 requests the calibration path of virtual-path client selection.
        local_steps: number of steps to take, at most ``T``.
        steps_before: number of steps that were requested from this client in earlier rounds. It gives the position in
            the client's data, so a restarted client needs no memory.
        first_round: round of the first of the scalars.
        scalars: float32, the aggregated scalars of rounds ``first_round`` to ``round - 1``, ``T q`` each; or None.
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
        """Returns the message's bytes."""
        kind, values = (_Kind.SCALARS, self.scalars) if self.masters is None else (_Kind.MASTERS, self.masters)
        assert values is not None
        header = _Header(
            kind=kind,
            client=self.client,
            round=self.round,
            local_steps=self.local_steps,
            extra=self.first_round,
            amount=self.steps_before,
        )
        return _encode(header, _fp32_bytes(values))

    @classmethod
    def decode(cls, data: bytes, max_values: int = MAX_VALUES) -> "TrainRequest":
        """Reads a message.

        Args:
            data: any bytes.
            max_values: maximum number of values in the message.

        Raises:
            MessageError: if the bytes are not a valid request; the error is a ``RejectedError`` with the reason. No
                other error is raised, whatever the bytes.
        """
        header, words = _decode(data, max_values)
        if header.kind not in _REQUESTS:
            raise header.malformed("expected a request, got a reply")
        if header.loss is not None:
            raise header.malformed("the request has a loss, only a reply may have one")
        if not min(header.round, 1) <= header.extra <= header.round:
            raise header.malformed(
                f"the request for round {header.round} has scalars from round {header.extra} on, which is out of range"
            )
        values = {"scalars" if header.kind is _Kind.SCALARS else "masters": _finite_values(header, words)}
        return cls(
            client=header.client,
            round=header.round,
            local_steps=header.local_steps,
            first_round=header.extra,
            steps_before=header.amount,
            **values,
        )


@dataclass(frozen=True, kw_only=True)
class Stale:
    """Message from client to server: the client is at an earlier round than the request begins at.

    This happens after the client was restarted.

    Args:
        client: id of the client.
        round: round of the request.
        at_round: round at whose beginning the client is.
    """

    client: int
    round: int
    at_round: int

    def encode(self) -> bytes:
        """Returns the message's bytes."""
        header = _Header(
            kind=_Kind.STALE, client=self.client, round=self.round, local_steps=0, extra=self.at_round, amount=0
        )
        return _encode(header, b"")

    def as_error(self) -> RejectedError:
        """Returns the error with which this message is rejected as a reply."""
        text = f"client {self.client} is at round {self.at_round}, the request was for round {self.round}"
        return RejectedError(Rejection.STALE, text, self.client)


@dataclass(kw_only=True, slots=True)  # not frozen: a server makes a hundred thousand a round, in a third of the time
class TrainReply:
    """Message from client to server: the results of the client's local steps.

    Args:
        client: id of the client.
        round: round of the request.
        local_steps: number of requested steps.
        examples: the client's number of examples.
        loss: mean training loss over its steps; None: not reported, because every query was skipped or the loss is
            private.
        scalars: float32 [local_steps q], NaN for a skipped query; or None.
        masters: float32 [k], the masked weights after the steps of a client that trains by backpropagation; or None.
    """

    client: int
    round: int
    local_steps: int
    examples: int
    loss: float | None
    scalars: np.ndarray | None = None
    masters: np.ndarray | None = None

    def encode(self) -> bytes:
        """Returns the message's bytes."""
        if self.masters is not None:
            kind, payload, skipped = _Kind.MASTERS_REPLY, _fp32_bytes(self.masters), 0
        else:
            assert self.scalars is not None
            missing = np.isnan(self.scalars)
            positions = np.flatnonzero(missing).astype(_UINT32)
            kind, skipped = _Kind.REPLY, len(positions)
            payload = _fp32_bytes(np.where(missing, np.float32(0), self.scalars)) + positions.tobytes()
        header = _Header(
            kind=kind,
            client=self.client,
            round=self.round,
            local_steps=self.local_steps,
            extra=skipped,
            amount=self.examples,
            loss=self.loss,
        )
        return _encode(header, payload)

    @classmethod
    def decode(cls, data: bytes, max_values: int = MAX_VALUES) -> "TrainReply":
        """Reads a message.

        Args:
            data: any bytes.
            max_values: maximum number of values in the message, including the positions of skipped queries.

        Raises:
            MessageError: if the bytes are not a valid reply; the error is a ``RejectedError`` with the reason. No other
                error is raised, whatever the bytes.
        """
        answer = decode_answer(data, max_values)
        if isinstance(answer, Stale):
            raise answer.as_error()
        return answer

    @classmethod
    def _from_payload(cls, header: "_Header", words: np.ndarray) -> "TrainReply":
        if header.kind is _Kind.MASTERS_REPLY and header.extra:
            raise header.malformed(
                f"a reply with master values has no queries, this one reports {header.extra} skipped"
            )
        values = _values_with_nan(header, words)
        has_scalars = header.kind is _Kind.REPLY
        return cls(
            client=header.client,
            round=header.round,
            local_steps=header.local_steps,
            examples=header.amount,
            loss=header.loss,
            scalars=values if has_scalars else None,
            masters=None if has_scalars else values,
        )


def decode_answer(data: bytes, max_values: int = MAX_VALUES) -> TrainReply | Stale:
    """Reads a client's answer to a request; see ``TrainReply.decode`` for arguments and errors."""
    header, words = _decode(data, max_values)
    if header.kind in _REQUESTS:
        raise header.malformed("expected a reply, got a request")
    if header.kind is not _Kind.STALE:
        return TrainReply._from_payload(header, words)
    if header.local_steps or header.amount or header.loss is not None or len(words):
        raise header.malformed("the message of a stale client has steps, examples, a loss or values; it must have none")
    if not 1 <= header.extra < header.round:
        text = f"a client that is stale in round {header.round} cannot be at round {header.extra}"
        raise header.malformed(text)
    return Stale(client=header.client, round=header.round, at_round=header.extra)


class _Header(NamedTuple):
    """Header of a message, without the fields that follow from the payload.

    ``extra`` is the number at offset 20, ``amount`` the number at offset 28; their meaning depends on the kind.
    """

    kind: _Kind
    client: int
    round: int
    local_steps: int
    extra: int
    amount: int
    loss: float | None = None

    def malformed(self, text: str) -> RejectedError:
        return RejectedError(Rejection.MALFORMED, text, self.client)


def _fp32_bytes(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, dtype=_FP32).tobytes()


def _encode(header: _Header, payload: bytes) -> bytes:
    has_loss = header.loss is not None
    without_crc = _HEADER.pack(
        _MAGIC,
        header.kind,
        _VERSION,
        _HAS_LOSS if has_loss else 0,
        0,
        header.client,
        header.round,
        header.local_steps,
        header.extra,
        len(payload) // 4,
        header.amount,
        header.loss if has_loss else 0.0,
        0,
    )[:-4]
    return without_crc + struct.pack("<I", zlib.crc32(payload, zlib.crc32(without_crc))) + payload


def _decode(data: bytes, max_values: int) -> tuple[_Header, np.ndarray]:
    """Returns header and payload (uint32). Makes the cheap checks first."""
    if len(data) < HEADER_BYTES:
        text = f"the message has {len(data)} bytes, a header alone has {HEADER_BYTES}"
        raise RejectedError(Rejection.MALFORMED, text)
    magic, kind, version, flags, zero, client, round, steps, extra, count, amount, loss, crc = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise RejectedError(
            Rejection.MALFORMED,
            f"the message begins with {magic!r}, version {version}; {_MAGIC!r}, version {_VERSION} was expected",
        )
    if count > max_values:
        text = f"the message claims {count} values, at most {max_values} were expected"
        raise RejectedError(Rejection.MALFORMED, text)
    if len(data) != HEADER_BYTES + 4 * count:
        text = f"the message has {len(data)} bytes and claims {count} values, which take {HEADER_BYTES + 4 * count}"
        raise RejectedError(Rejection.MALFORMED, text)
    if zlib.crc32(memoryview(data)[HEADER_BYTES:], zlib.crc32(data[: HEADER_BYTES - 4])) != crc:
        raise RejectedError(Rejection.MALFORMED, "the message's checksum does not match; it was damaged in transit")
    if kind not in _KINDS:
        raise RejectedError(Rejection.MALFORMED, f"unknown kind of message: {kind}", client)
    if zero or flags & ~_HAS_LOSS:
        raise RejectedError(
            Rejection.MALFORMED, f"reserved bits are set (flags {flags:#04x}, reserved byte {zero:#04x})", client
        )
    if not flags and data[HEADER_BYTES - 8 : HEADER_BYTES - 4] != bytes(4):
        text = f"the loss is {loss} in a message without a loss, 0 was expected"
        raise RejectedError(Rejection.MALFORMED, text, client)
    if not math.isfinite(loss):
        raise RejectedError(Rejection.NOT_FINITE, f"the loss is {loss}", client)
    header = _Header(_KINDS[kind], client, round, steps, extra, amount, loss if flags else None)
    return header, np.frombuffer(data, _UINT32, -1, HEADER_BYTES)


def _finite_values(header: _Header, words: np.ndarray) -> np.ndarray:
    """Returns the words as fp32 values; raises ``RejectedError`` unless all are finite."""
    values = words.view(_FP32)
    finite = np.isfinite(values)
    if np.count_nonzero(finite) < len(values):  # takes half the time of all() for few values
        position = int(np.flatnonzero(~finite)[0])
        text = f"value {position} is not finite ({values[position]})"
        raise RejectedError(Rejection.NOT_FINITE, text, header.client)
    return values


def _values_with_nan(header: _Header, words: np.ndarray) -> np.ndarray:
    """Returns a reply's values, with NaN at the positions of the skipped queries."""
    skipped = header.extra
    if not skipped:
        return _finite_values(header, words)
    count = len(words) - skipped
    if skipped > count:
        raise header.malformed(f"the reply has {len(words)} values and claims that {skipped} are positions of others")
    values, positions = _finite_values(header, words[:count]), words[count:]
    if (positions >= count).any() or (positions[1:] <= positions[:-1]).any():
        raise header.malformed(f"the positions of skipped queries must be ascending, unique and below {count}")
    if words[positions].any():
        raise header.malformed("a skipped query has a scalar other than 0")
    values = values.copy()
    values[positions] = np.nan
    return values


__all__ = ["HEADER_BYTES", "MAX_VALUES", "Stale", "TrainReply", "TrainRequest", "decode_answer"]
