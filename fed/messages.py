"""What server and clients send each other: a 40-byte header and fp32 scalars. No weights go up, no code comes down.

header   magic "MKT1", kind, version, two reserved bytes; client, round, local steps, first round, number of fp32
         values, examples (uint32 each), loss (fp32), CRC-32 of everything else (uint32); little-endian
payload  the fp32 values, little-endian
"""

import math
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ..errors import MessageError

_MAGIC = b"MKT1"
_VERSION = 1
_HEADER = struct.Struct("<4sBBxxIIIIIIfI")
HEADER_BYTES = _HEADER.size
# Values one message may carry: masters of a mask of 268 million elements (1 GiB).
_MOST_VALUES = 1 << 28


class _Kind(IntEnum):
    SCALARS = 1  # request: catch up by scalars
    MASTERS = 2  # request: catch up by master values
    REPLY = 3
    MASTERS_REPLY = 4  # of a client that trains by backpropagation: the upper bound, which sends weights


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Server to client: catch up to the beginning of a round and take some local steps.

    Args:
        client: id of the client it is for.
        round: from 1; 0 asks for the calibration path of virtual-path selection.
        local_steps: steps this client is to take, at most ``T``.
        first_round: round of the first of the scalars.
        scalars: float32, the aggregated scalars of rounds ``first_round`` to ``round - 1``, ``T`` each; or None.
        masters: float32 [k], the masked weights at the beginning of ``round``, instead of scalars; or None.
    """

    client: int
    round: int
    local_steps: int
    first_round: int
    scalars: np.ndarray | None = None
    masters: np.ndarray | None = None

    def encode(self) -> bytes:
        """The message's bytes."""
        kind, values = (_Kind.SCALARS, self.scalars) if self.masters is None else (_Kind.MASTERS, self.masters)
        assert values is not None
        return _encode(kind, self.client, self.round, self.local_steps, self.first_round, 0, 0.0, values)

    @classmethod
    def decode(cls, data: bytes) -> "TrainRequest":
        """Reads a message; raises ``MessageError`` saying what is wrong with it."""
        kind, client, round, local_steps, first_round, _, _, values = _decode(data)
        if kind in (_Kind.REPLY, _Kind.MASTERS_REPLY):
            raise MessageError("expected a request, got a reply")
        if not min(round, 1) <= first_round <= round:
            raise MessageError(f"a request for round {round} cannot bring the scalars from round {first_round} on")
        named = {"scalars": values} if kind is _Kind.SCALARS else {"masters": values}
        return cls(client=client, round=round, local_steps=local_steps, first_round=first_round, **named)


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """Client to server: the scalars of its local steps.

    Args:
        client: id of the client.
        round: it answers.
        local_steps: steps taken.
        scalars: float32, one per step taken and query; or None.
        masters: float32 [k], the masked weights after its steps, where it trains by backpropagation; or None.
        examples: the client's number of examples.
        loss: mean training loss over its steps.
    """

    client: int
    round: int
    local_steps: int
    examples: int
    loss: float
    scalars: np.ndarray | None = None
    masters: np.ndarray | None = None

    def encode(self) -> bytes:
        """The message's bytes."""
        kind, values = (_Kind.REPLY, self.scalars) if self.masters is None else (_Kind.MASTERS_REPLY, self.masters)
        assert values is not None
        return _encode(kind, self.client, self.round, self.local_steps, 0, self.examples, self.loss, values)

    @classmethod
    def decode(cls, data: bytes) -> "TrainReply":
        """Reads a message; raises ``MessageError`` saying what is wrong with it."""
        kind, client, round, local_steps, _, examples, loss, values = _decode(data)
        if kind not in (_Kind.REPLY, _Kind.MASTERS_REPLY):
            raise MessageError("expected a reply, got a request")
        if not math.isfinite(loss):
            raise MessageError(f"the loss is {loss}")
        if not np.isfinite(values).all():
            raise MessageError(f"value {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
        named = {"scalars": values} if kind is _Kind.REPLY else {"masters": values}
        return cls(client=client, round=round, local_steps=local_steps, examples=examples, loss=loss, **named)


_Fields = tuple[_Kind, int, int, int, int, int, float, np.ndarray]


def _encode(
    kind: _Kind,
    client: int,
    round: int,
    local_steps: int,
    first_round: int,
    examples: int,
    loss: float,
    values: np.ndarray,
) -> bytes:
    payload = np.ascontiguousarray(values, dtype="<f4").tobytes()
    fields = (kind, _VERSION, client, round, local_steps, first_round, len(payload) // 4, examples, loss)
    unsigned = _HEADER.pack(_MAGIC, *fields, 0)[:-4]
    return unsigned + struct.pack("<I", zlib.crc32(payload, zlib.crc32(unsigned))) + payload


def _decode(data: bytes) -> _Fields:
    if len(data) < HEADER_BYTES:
        raise MessageError(f"the message has {len(data)} bytes, a header {HEADER_BYTES}")
    magic, kind, version, client, round, steps, first, count, examples, loss, crc = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise MessageError(f"the message begins {magic!r}, version {version}; expected {_MAGIC!r}, version {_VERSION}")
    if count > _MOST_VALUES or len(data) != HEADER_BYTES + 4 * count:
        raise MessageError(f"the message has {len(data)} bytes and claims {count} values")
    if zlib.crc32(data[HEADER_BYTES:], zlib.crc32(data[: HEADER_BYTES - 4])) != crc:
        raise MessageError("the message's checksum does not match: it was damaged on the way")
    if kind not in tuple(_Kind):
        raise MessageError(f"unknown kind of message {kind}")
    values = np.frombuffer(data, dtype="<f4", offset=HEADER_BYTES)
    return _Kind(kind), client, round, steps, first, examples, loss, values


__all__ = ["HEADER_BYTES", "TrainReply", "TrainRequest"]
