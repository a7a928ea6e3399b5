"""Experiment (e), mask source: accuracy with masks of four sources, and their share of the tasks' squared gradients.

References:
    Meerkat, arXiv 2506.03337, sections 3 and 5.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...fed.config.run_config import RunConfig
from ...fed.methods import Method
from ...fed.setup.data import encode
from ...fed.setup.mask import make_mask, mask_coverage
from ...fed.setup.model import load_language_model
from ..figures import save_figure, subplots
from ..tables import over_seeds, table
from .experiment import Arm, Experiment, Results

_SOURCES = {
    Method.MEERKAT: "pre-training text",
    Method.TASK_MASK: "the task trained on",
    Method.WEIGHT_MAGNITUDE: "magnitude",
    Method.RANDOM_MASK: "random",
}
_BEST = "the task's own best"
_RATE_FACTORS = (1, 3, 10)  # times the configured learning rate


class MaskSource(Experiment):
    """Accuracy with masks of four sources, and how well each mask covers other tasks."""

    name = "mask-source"
    title = "Where should the mask come from, and does it transfer?"
    sets = ("method", "mask")
    compares_tasks = True

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """Returns one arm per source and learning rate: insensitive elements need larger steps."""
        return [
            Arm(
                name=f"{source}, lr {config.step.lr * factor:.3g}",
                settings={"method": method, "lr": config.step.lr * factor},
            )
            for method, source in _SOURCES.items()
            for factor in _RATE_FACTORS
        ]

    def measure(self, configs: Sequence[RunConfig], tasks: Sequence[str]) -> Any:
        """Returns {task: {source: [coverage, one per seed]}}.

        The seed determines the task's examples and the random mask.
        """
        measured: dict[str, dict[str, list[dict[str, float]]]] = {}
        for config in configs:
            lm = load_language_model(config)
            train = encode(config, lm).train
            masks = [make_mask(config.replace(method=method), lm, train) for method in _SOURCES]
            for task in tasks:
                coverages = mask_coverage(config.on_task(task), lm, masks)
                for source, coverage in zip(_SOURCES.values(), coverages, strict=True):
                    measured.setdefault(task, {}).setdefault(source, []).append(dataclasses.asdict(coverage))
        return measured

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        by_source: dict[str, list[str]] = {}
        for arm in results.arms:
            by_source.setdefault(arm.split(", lr ")[0], []).append(over_seeds(results.after(arm)))
        rates = list(dict.fromkeys(arm.split(", ")[-1] for arm in results.arms))
        scores = table(
            [f"{results.score.title} after, mask from", *rates],
            [[source, *cells] for source, cells in by_source.items()],
        )
        lines = []
        for task, sources in results.measured.items():
            for source, coverages in sources.items():
                lines.append([task, source, _percent(coverages, "captured"), _percent(coverages, "best"),
                              _percent(coverages, "chance"), _percent(coverages, "overlap")])  # fmt: skip
        columns = ["task", "mask from", "holds of its squared gradient", "best mask of that size", "chance"]
        columns.append("overlap with the best")
        return f"{scores}\n\n{table(columns, lines)}"

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        figure, axes = subplots(1, 1)
        tasks = list(results.measured)
        width = 0.8 / (len(_SOURCES) + 1)
        for i, source in enumerate([*_SOURCES.values(), _BEST]):
            heights = [_mean_share(results.measured[task], source) for task in tasks]
            axes[0].bar([x + i * width for x in range(len(tasks))], heights, width, label=source, color=f"C{i}")
        axes[0].set(xticks=[x + 0.32 for x in range(len(tasks))], xticklabels=tasks)
        axes[0].set_ylabel("share of the task's squared gradient")
        save_figure(figure, axes, path)


def _mean_share(by_source: dict[str, list[dict[str, float]]], source: str) -> float:
    """Returns the mean over seeds of the share that a source's masks, or the best masks, hold of one task."""
    if source == _BEST:
        shares = [coverage["best"] for coverage in next(iter(by_source.values()))]  # the same for every source
    else:
        shares = [coverage["captured"] for coverage in by_source[source]]
    return sum(shares) / len(shares)


def _percent(coverages: Sequence[dict[str, float]], key: str) -> str:
    return over_seeds([100 * coverage[key] for coverage in coverages], 2) + "%"


__all__ = ["MaskSource"]
