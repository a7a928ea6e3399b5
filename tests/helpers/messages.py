"""Messages with single bytes changed and their checksum set right."""

import struct
import zlib

from meerkat_engine.fed.messages import HEADER_BYTES


def sealed(fields: bytes) -> bytes:
    """A message with its checksum set right, whatever else it holds."""
    crc = zlib.crc32(fields[HEADER_BYTES:], zlib.crc32(fields[: HEADER_BYTES - 4]))
    return fields[: HEADER_BYTES - 4] + struct.pack("<I", crc) + fields[HEADER_BYTES:]


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return sealed(data[:at] + value + data[at + len(value) :])
