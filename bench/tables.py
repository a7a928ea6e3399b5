"""Formats tables and numbers for Markdown."""

import math
import statistics
from collections.abc import Sequence


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table whose columns are also aligned in a terminal."""
    widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
    rows = [columns, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def amount(count: float, unit: str = "B") -> str:
    """Returns a number with an SI prefix and a unit, such as ``1.35 MB``."""
    for prefix in ("", "k", "M", "G", "T"):
        if count < 1000 or prefix == "T":
            break
        count /= 1000
    return f"{count:.3g} {prefix}{unit}".rstrip()


def over_seeds(values: Sequence[float], digits: int = 3) -> str:
    """Returns the mean and standard deviation of ``values``, one per seed; a single value stands alone.

    Values that are not finite, of runs that diverged, are counted instead.
    """
    if diverged := sum(not math.isfinite(value) for value in values):
        return f"not finite in {diverged} of {len(values)}"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


__all__ = ["amount", "over_seeds", "table"]
