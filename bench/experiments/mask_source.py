"""(e) Where the mask comes from: accuracy of four sources, and what each holds of the tasks' squared gradients.

Reference: Meerkat, arXiv 2506.03337, sections 3 and 5.
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
from ..tables import over_seeds, table
from .figures import finished, subplots
from .grid import Arm, Experiment, Results

_SOURCES = {
    Method.MEERKAT: "pre-training text",
    Method.TASK_MASK: "the task trained on",
    Method.WEIGHT_MAGNITUDE: "magnitude",
    Method.RANDOM_MASK: "random",
}
_BEST = "the task's own best"
_RATES = (1, 3, 10)


class MaskSource(Experiment):
    """Accuracy of four sources of the mask, and how far each reaches into other tasks."""

    name = "mask-source"
    title = "Where should the mask come from, and does it transfer?"
    sets = ("method", "mask")
    compares_tasks = True

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """A source and a learning rate each: insensitive elements need larger steps."""
        return [
            Arm(
                name=f"{shown}, lr {config.step.lr * times:.3g}",
                settings={"method": method, "lr": config.step.lr * times},
            )
            for method, shown in _SOURCES.items()
            for times in _RATES
        ]

    def measure(self, configs: Sequence[RunConfig], tasks: Sequence[str]) -> Any:
        """{task: {source: [transfer a seed]}}; a seed chooses the task's examples and the random mask."""
        found: dict[str, dict[str, list[dict[str, float]]]] = {}
        for config in configs:
            lm = load_language_model(config)
            train = encode(config, lm.tokenizer).train
            masks = [make_mask(config.replace(method=m), lm, train) for m in _SOURCES]
            for task in tasks:
                reached = mask_coverage(config.on_task(task), lm, masks)
                for shown, each in zip(_SOURCES.values(), reached, strict=True):
                    found.setdefault(task, {}).setdefault(shown, []).append(dataclasses.asdict(each))
        return found

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        by_source: dict[str, list[str]] = {}
        for arm in results.arms:
            by_source.setdefault(arm.split(", lr ")[0], []).append(over_seeds(results.accuracy(arm)))
        rates = list(dict.fromkeys(arm.split(", ")[-1] for arm in results.arms))
        accuracies = table(
            ["accuracy after, mask from", *rates], [[shown, *found] for shown, found in by_source.items()]
        )
        lines = []
        for task, sources in results.measured.items():
            for shown, found in sources.items():
                lines.append([task, shown, _percent(found, "captured"), _percent(found, "best"),
                              _percent(found, "chance"), _percent(found, "overlap")])  # fmt: skip
        columns = ["task", "mask from", "holds of its squared gradient", "best mask of that size", "chance"]
        columns.append("overlap with the best")
        return f"{accuracies}\n\n{table(columns, lines)}"

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        figure, axes = subplots(1, 1)
        tasks = list(results.measured)
        width = 0.8 / (len(_SOURCES) + 1)
        for i, shown in enumerate([*_SOURCES.values(), _BEST]):
            heights = [_mean(results.measured[task], shown) for task in tasks]
            axes[0].bar([at + i * width for at in range(len(tasks))], heights, width, label=shown, color=f"C{i}")
        axes[0].set(xticks=[at + 0.32 for at in range(len(tasks))], xticklabels=tasks)
        axes[0].set_ylabel("share of the task's squared gradient")
        finished(figure, axes, path)


def _mean(of_task: dict[str, list[dict[str, float]]], shown: str) -> float:
    found, key = (next(iter(of_task.values())), "best") if shown == _BEST else (of_task[shown], "captured")
    return sum(each[key] for each in found) / len(found)


def _percent(found: Sequence[dict[str, float]], key: str) -> str:
    return over_seeds([100 * each[key] for each in found], 2) + "%"


__all__ = ["MaskSource"]
