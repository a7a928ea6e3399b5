"""Lines of UTF-8 text. Only a line feed ends one: text may hold U+2028, U+0085 and carriage returns."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from ..errors import DataError

_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_content(path: Path) -> bytes:
    """Returns the bytes of a file.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise DataError(f"cannot read {path}: {error}") from error


def decoded_lines(content: bytes, path: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a text in UTF-8, each with the line feed that ends it, if one does.

    Args:
        content: the text.
        path: where it comes from, for the error message.

    Yields:
        Number of the line, from 1, and the line.

    Raises:
        DataError: if the text is not UTF-8; the message names the line, and the byte counted from 1 in the file.
    """
    begin = 0
    for number, line in enumerate(BytesIO(content), 1):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            byte, at = line[error.start], begin + error.start + 1
            guess = _OTHER_ENCODINGS.get(content[:2])
            raise DataError(
                f"{path}, line {number}: byte {at} of the file (0x{byte:02x}) is not UTF-8"
                f"{f'; the file looks like {guess}' if guess else ''}; save the file as UTF-8"
            ) from error
        begin += len(line)


__all__ = ["decoded_lines", "read_content"]
