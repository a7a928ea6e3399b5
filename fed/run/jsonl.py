"""JSON Lines as a run writes them: an object a line, of which a crash may tear the last."""

import json
import math
from pathlib import Path
from typing import Any

from ...engine.errors import RunError

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The objects of a file, none if there is no file; a last line without its newline is torn, and left out.

    Raises:
        RunError: naming the line, if another one cannot be read.
    """
    texts = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_parsed(text, path, number) for number, text in enumerate(texts, 1)]


def is_number(value: Any) -> bool:
    """Whether it is a number that JSON can hold; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(value: float) -> float | None:
    """A number as JSON has it: null for what is not finite, as the loss of a ruined model is."""
    return value if math.isfinite(value) else None


def _parsed(text: bytes, path: Path, number: int) -> Line:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}, line {number}: no JSON ({error}); the file is damaged") from error
    if not isinstance(line, dict):
        raise RunError(f"{path}, line {number}: no JSON object; the file is damaged")
    return line


__all__ = ["Line", "finite", "is_number", "read_lines"]
