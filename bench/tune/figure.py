"""The figure of a search: held-out loss against learning rate."""

import math
from pathlib import Path

from ..figures import save_figure, subplots
from .result import Found


def draw(found: Found, path: Path) -> None:
    """Writes the figure: a line for each rung, and for each eps and density that was tried.

    Losses above that of the base model are cut off, so that those below can be told apart.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    search = found.search
    figure, (axis,) = subplots(1, 1)
    lines: dict[str, list[tuple[float, float]]] = {}
    for point, candidate in search.candidates.items():
        values = search.grid.values(point)
        others = "".join(f", {name} {values[name]:g}" for name in search.grid.axes[1:])
        for rung in search.rungs:
            if rung <= search.reached[point]:
                lines.setdefault(f"round {rung}{others}", []).append((values["lr"], candidate.loss(rung)))
    for label, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
    axis.axhline(search.start_loss, color="gray", linewidth=0.8, linestyle="--", label="base model")
    axis.axvline(search.grid.values(found.chosen)["lr"], color="black", linewidth=0.8, linestyle=":", label="chosen")
    losses = [loss for points in lines.values() for _, loss in points if math.isfinite(loss)]
    low, high = min(losses), search.start_loss
    axis.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="held-out loss",
        ylim=(low - 0.1 * (high - low), high + 0.1 * (high - low)),
    )
    partial = path.with_name(f".{path.name}.partial.png")
    save_figure(figure, [axis], partial)
    partial.replace(path)


__all__ = ["draw"]
