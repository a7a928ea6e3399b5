"""Files with the updates of a training run. Base model, mask and updates determine the trained model.

Each update is one line of JSON, ``[seed, lr, g]``, in order, as ``replay`` takes them. ``g`` is null for a skipped
query.
"""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .atomic_files import write_atomic
from .errors import RunError

# Seed, learning rate of the query (lr / queries), projected gradient; see ``replay``.
Update = tuple[int, float, float]


def write_updates(path: Path | str, updates: Iterable[Update]) -> None:
    """Writes a file of updates atomically; an existing file is replaced.

    Args:
        path: path of the file; its directory must exist.
        updates: (seed in [0, 2**64), learning rate, fp32 projected gradient) of each update; the projected gradient is
            NaN for a skipped query.

    Raises:
        RunError: if the file cannot be written.
    """
    lines = (json.dumps([seed, lr, None if math.isnan(g) else g]) + "\n" for seed, lr, g in updates)
    write_atomic(Path(path), "".join(lines).encode())


def read_updates(path: Path | str) -> list[Update]:
    """Reads a file of updates; returns exactly the numbers that were written.

    Raises:
        RunError: if the file cannot be read, or a line is not an update; it names the line.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise RunError(f"cannot read the updates {path}: {error.strerror or error}") from error
    return [_parse_update(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parse_update(line: bytes, where: str) -> Update:
    try:
        update = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: not JSON ({error}); the file is damaged") from error
    if not isinstance(update, list) or len(update) != 3:
        raise RunError(f"{where}: not a list [seed, lr, g]; the file is damaged")
    seed, lr, g = update
    if type(seed) is not int or not 0 <= seed < 1 << 64 or not _is_finite(lr) or not (g is None or _is_finite(g)):
        raise RunError(
            f"{where}: {update} is not a seed in [0, 2**64), a finite lr and a finite or null g; the file is damaged"
        )
    return seed, float(lr), math.nan if g is None else float(g)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN


__all__ = ["Update", "read_updates", "write_updates"]
