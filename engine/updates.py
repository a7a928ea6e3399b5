"""The updates of a training as a file: with base and mask, all that its model is.

A line of JSON an update, ``[seed, lr, g]``, in order: what ``replay`` takes. ``g`` is null for an update that was not
taken.
"""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .atomic_files import write_atomic
from .errors import RunError

# Seed, learning rate (a query's share of it), projected gradient; see ``replay``.
Update = tuple[int, float, float]


def write_updates(path: Path | str, updates: Iterable[Update]) -> None:
    """Writes a file of updates, whole or not at all; an old one is replaced.

    Args:
        path: in a directory that is there.
        updates: seed in [0, 2**64), learning rate, fp32 projected gradient; NaN for one that was not taken.

    Raises:
        RunError: if it cannot be written.
    """
    lines = (json.dumps([seed, lr, None if math.isnan(g) else g]) + "\n" for seed, lr, g in updates)
    write_atomic(Path(path), "".join(lines).encode())


def read_updates(path: Path | str) -> list[Update]:
    """The updates of a file, the same numbers that were written.

    Raises:
        RunError: if it cannot be read, naming the line if one is no update.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise RunError(f"cannot read the updates {path}: {error.strerror or error}") from error
    return [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parsed(line: bytes, where: str) -> Update:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: no JSON ({error}); the file is damaged") from error
    if not isinstance(found, list) or len(found) != 3:
        raise RunError(f"{where}: no [seed, lr, g]; the file is damaged")
    seed, lr, g = found
    if type(seed) is not int or not 0 <= seed < 1 << 64 or not _is_finite(lr) or not (g is None or _is_finite(g)):
        raise RunError(
            f"{where}: {found} is no seed in [0, 2**64), finite lr and finite g or null; the file is damaged"
        )
    return seed, float(lr), math.nan if g is None else float(g)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN


__all__ = ["Update", "read_updates", "write_updates"]
