"""Lines of JSON that end in a CRC-32, which is continued from that of another line."""

import json
import zlib
from typing import Any

from ...engine.errors import MeerkatError
from ..scalars import ClientScalars
from .lines import client_scalars_json

_CRC_KEY = b',"crc32":"'


def encode_line(fields: dict[str, Any], previous_crc: int) -> tuple[bytes, int]:
    """Writes a line.

    Args:
        fields: the fields of the JSON object, at least one.
        previous_crc: the CRC-32 from which the line's own is continued.

    Returns:
        The line and its CRC-32.
    """
    body = b"{" + b",".join(b"%b:%b" % (_json(name), _json(value)) for name, value in fields.items())
    crc = zlib.crc32(body, previous_crc)
    return b'%b%b%08x"}\n' % (body, _CRC_KEY, crc), crc


def decode_line(
    line: bytes, previous_crc: int, where: str, error: type[MeerkatError], remedy: str = ""
) -> tuple[dict[str, Any], int]:
    """Reads a line.

    Args:
        line: the line, without its newline.
        previous_crc: see ``encode_line``.
        where: file and line number, for messages.
        error: class of the error that is raised.
        remedy: what to do about a damaged line, for messages; begins with "; ".

    Returns:
        The line's fields and its CRC-32.

    Raises:
        MeerkatError: if the line is damaged or does not follow the other one.
    """
    body, key, written_crc = line.rpartition(_CRC_KEY)
    crc = zlib.crc32(body, previous_crc)
    if not key or written_crc != f'{crc:08x}"}}'.encode():
        raise error(
            f"{where}: the checksum does not match; the line is damaged, or was not written directly "
            f"after the lines before it{remedy}"
        )
    try:
        fields = json.loads(body + b"}")
    except (ValueError, RecursionError) as reason:
        raise error(f"{where}: the line is not JSON ({reason}){remedy}") from reason
    if not isinstance(fields, dict):
        raise error(f"{where}: the line is not a JSON object{remedy}")
    return fields, crc


def _json(value: Any) -> bytes:
    if isinstance(value, ClientScalars):
        return client_scalars_json(value)
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


__all__ = ["decode_line", "encode_line"]
