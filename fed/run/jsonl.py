"""Reads the JSON Lines files of a run: one object a line. A crash may leave the last line incomplete."""

import json
import math
from pathlib import Path
from typing import Any

from ...engine.errors import RunError

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """Reads the objects of a JSON Lines file.

    Returns:
        The objects; none if there is no file. A last line without its newline is incomplete and left out.

    Raises:
        RunError: if a complete line is not a JSON object. The message has its number.
    """
    texts = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_parse(text, path, number) for number, text in enumerate(texts, 1)]


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite_or_none(value: float) -> float | None:
    """A number for JSON, which has no NaN or infinity: None if it is not finite, such as the loss of a ruined model."""
    return value if math.isfinite(value) else None


def _parse(text: bytes, path: Path, number: int) -> Line:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}, line {number}: not JSON ({error}); the file is damaged") from error
    if not isinstance(line, dict):
        raise RunError(f"{path}, line {number}: not a JSON object; the file is damaged")
    return line


__all__ = ["Line", "finite_or_none", "is_number", "read_lines"]
