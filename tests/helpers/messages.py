"""Changes single bytes of messages and corrects their checksum."""

import struct
import zlib

from meerkat_engine.fed.messages import HEADER_BYTES


def with_checksum(message: bytes) -> bytes:
    """The message with a correct checksum, whatever else it contains."""
    crc = zlib.crc32(message[HEADER_BYTES:], zlib.crc32(message[: HEADER_BYTES - 4]))
    return message[: HEADER_BYTES - 4] + struct.pack("<I", crc) + message[HEADER_BYTES:]


def with_bytes(message: bytes, offset: int, value: bytes) -> bytes:
    """The message with other bytes at an offset, and a correct checksum."""
    return with_checksum(message[:offset] + value + message[offset + len(value) :])
