"""Shared parts of the experiments' figures."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.extras import require_matplotlib
from ..fed.report.figures import widen

Points = Sequence[tuple[float, float]]


def subplots(rows: int, columns: int, **settings: Any) -> tuple[Any, Any]:
    """Returns a new figure and its axes as a flat list."""
    require_matplotlib()
    from matplotlib import pyplot

    size = (1.5 + 4.5 * columns, 0.8 + 3.2 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **settings)
    return figure, axes.flatten()


def mean_line(axis: Any, runs: Sequence[Points], color: str, label: str) -> None:
    """Draws the mean over runs as a line and each run as a faint one.

    Args:
        axis: the axes to draw on.
        runs: points (x, y) of each run; all runs have the same number of points.
        color: color of the lines.
        label: label of the mean in the legend.
    """
    for run in runs:
        axis.plot(*zip(*run, strict=True), color=color, linewidth=0.6, alpha=0.35)
    x = [statistics.fmean(p[0] for p in points) for points in zip(*runs, strict=True)]
    y = [statistics.fmean(p[1] for p in points) for points in zip(*runs, strict=True)]
    axis.plot(x, y, color=color, marker="o", markersize=3, label=label)


def save_figure(figure: Any, axes: Sequence[Any], path: Path) -> None:
    """Adds a grid and one legend for all axes, keeps small changes small, writes the figure and closes it."""
    from matplotlib import pyplot

    for axis in axes:
        if axis.get_yscale() == "linear":
            widen(axis)
        axis.grid(visible=True, which="major", alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


__all__ = ["Points", "mean_line", "save_figure", "subplots"]
