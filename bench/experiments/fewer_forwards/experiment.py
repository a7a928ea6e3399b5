"""The experiment ``fewer-forwards``: tables and figure of rules compared at equal forwards."""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import click

from ....fed.config.run_config import RunConfig
from ...figures import mean_line, save_figure, subplots
from ...tables import over_seeds, table
from ..experiment import Experiment, Results, Settings
from ..paired import difference_of
from .methods import METHODS
from .problem import Problem
from .search import compare

BASELINE = "two-point"
_SHOWN = 6  # rules in the figure: the baseline and those with the smallest loss


class FewerForwards(Experiment):
    """Loss and score of step rules at equal forwards, with the learning rate of each searched for."""

    name = "fewer-forwards"
    title = "Which step rules need fewer forwards for the same accuracy, and can be replayed from scalars alone?"
    settings: ClassVar[Settings] = {"clients": 1, "partition": "iid"}
    sets = ("clients", "partition", "method", "queries", "schedule")

    def measure(self, configs: Sequence[RunConfig], tasks: Sequence[str]) -> Any:
        """Returns the trials of all rules; see ``compare``."""
        return compare(Problem.load(configs[0]), list(METHODS), [config.seed for config in configs], click.echo)

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        return rules_table(results.measured)

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        draw_rules(results.measured, path)


def rules_table(measured: Any) -> str:
    """Returns the table of the rules, the one with the smallest loss first.

    Args:
        measured: results of ``compare``, of the same seeds for all rules.
    """
    before = list(measured["before"].values())
    lines = [["before", "", "", *(over_seeds([values[i] for values in before]) for i in (1, 0)), "", ""]]
    for name in sorted(measured["methods"], key=lambda name: _mean_loss(measured, name)):
        steps = measured["forwards"] // METHODS[name].forwards
        scores, losses = _last(measured, name, "score"), _last(measured, name, "loss")
        lines.append(
            [name, f"{measured['methods'][name]['lr']:.3g}", str(steps), over_seeds(scores), over_seeds(losses),
             _paired(measured, name), _needed(measured, name)]
        )  # fmt: skip
    columns = ["rule", "lr", "steps", "score after", "validation loss", f"loss less {BASELINE}'s, 95%",
               f"forwards to {BASELINE}'s last loss"]  # fmt: skip
    return table(columns, lines)


def draw_rules(measured: Any, path: Path) -> None:
    """Draws loss and score of the best rules against forwards.

    Args:
        measured: see ``rules_table``.
        path: where to write the figure.
    """
    figure, axes = subplots(1, 2)
    best = sorted(measured["methods"], key=lambda name: (name != BASELINE, _mean_loss(measured, name)))[:_SHOWN]
    for i, (key, shown) in enumerate({"loss": "validation loss", "score": "score"}.items()):
        for color, name in enumerate(best):
            curves = [
                [(0.0, measured["before"][seed][i]), *((point["forwards"], _number(point[key])) for point in curve)]
                for seed, curve in measured["methods"][name]["trials"].items()
            ]
            if len({len(curve) for curve in curves}) == 1:
                mean_line(axes[i], curves, f"C{color}", name)
        axes[i].set(xlabel="forwards", ylabel=shown)
    save_figure(figure, axes, path)


def _last(measured: Any, name: str, key: str) -> list[float]:
    """Loss or score at the end of each trial, in the order of the seeds."""
    return [_number(curve[-1][key]) for _, curve in sorted(measured["methods"][name]["trials"].items())]


def _mean_loss(measured: Any, name: str) -> float:
    return statistics.fmean(_last(measured, name, "loss"))


def _paired(measured: Any, name: str) -> str:
    """Mean difference of the loss to the baseline's, paired by seed, and its 95% interval."""
    if name == BASELINE or BASELINE not in measured["methods"]:
        return ""
    losses, baseline = _last(measured, name, "loss"), _last(measured, BASELINE, "loss")
    difference = difference_of([a - b for a, b in zip(losses, baseline, strict=True)])
    return f"{difference.mean:+.3f} ± {difference.half_width:.3f}"


def _needed(measured: Any, name: str) -> str:
    """Forwards after which the mean loss over seeds is the baseline's at its end, linear between evaluations."""
    if BASELINE not in measured["methods"]:
        return ""
    goal = _mean_loss(measured, BASELINE)
    trials = measured["methods"][name]["trials"].values()
    start = statistics.fmean(values[0] for values in measured["before"].values())
    curve = [(0.0, start)]
    for points in zip(*trials, strict=False):
        curve.append((points[0]["forwards"], statistics.fmean(_number(point["loss"]) for point in points)))
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= goal < y0:
            return f"{x0 + (x1 - x0) * (y0 - goal) / (y0 - y1):.0f}"
    return f"more than {measured['forwards']}"


def _number(value: float | None) -> float:
    return math.inf if value is None else value


__all__ = ["BASELINE", "FewerForwards", "draw_rules", "rules_table"]
