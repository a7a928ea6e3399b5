"""Experiment (h), corrections: do corrections of the clients' scalars reduce what their different data cost?

Rounds are simulated in plain torch (``corrected_rounds``). All arms take the same number of steps. T = 1 without a
correction has no drift: it bounds what a correction can gain.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...engine.errors import ConfigError
from ...fed.config.run_config import RunConfig
from ..figures import save_figure, subplots
from ..tables import over_seeds, table
from .corrected_rounds import Correction, Rounds
from .experiment import Experiment, Results, Settings
from .fewer_forwards.problem import Problem

_CORRECTIONS = {
    "none": Correction(),
    "proximal, mu = 1": Correction(mu=1.0),
    "control variates, gain 0.15": Correction(gamma=0.15),
    "repeated seeds": Correction(repeated=True),
}
_PROJECTED = {"control variates, gain 0.15, projected": Correction(gamma=0.15, projected=True)}
_COLORS = {"T = 1": "C2", "T = 10": "C0", "T = 50": "C1"}


def _arms() -> dict[str, tuple[int, float, Correction]]:
    """Local steps, factor of the learning rate and correction of each arm by its name.

    Half the learning rate shows whether a correction does more than a smaller step.
    """
    groups = [
        (1, 1.0, {"none": Correction()}),
        (10, 1.0, _CORRECTIONS),
        (50, 1.0, _CORRECTIONS | _PROJECTED),
        (50, 0.5, {"none": Correction()}),
    ]
    return {
        f"T = {steps}, {name}{'' if factor == 1 else ', half the rate'}": (steps, factor, correction)
        for steps, factor, corrections in groups
        for name, correction in corrections.items()
    }


class Corrections(Experiment):
    """Corrections of scalars at equal steps, for T = 10 and T = 50, beside T = 1."""

    name = "corrections"
    title = "Do corrections of the clients' scalars help where their data differ?"
    settings: ClassVar[Settings] = {"rounds": 6, "local_steps": 50, "partition": "dirichlet", "alpha": 0.1}
    compares_tasks = True

    def measure(self, configs: Sequence[RunConfig], tasks: Sequence[str]) -> Any:
        """Returns {task: {arm: [accuracy, loss and spread, one per seed]}}, for the T that divide the steps."""
        total = configs[0].rounds * configs[0].local_steps
        arms = {name: arm for name, arm in _arms().items() if total % arm[0] == 0}
        if all(steps == 1 for steps, _, _ in arms.values()):
            raise ConfigError(f"rounds times local_steps is {total}; choose a multiple of 10")
        measured: dict[str, dict[str, list[dict[str, float]]]] = {}
        for task in tasks:
            problem = Problem.load(configs[0].on_task(task))
            measured[task] = {name: [] for name in arms}
            for name, (steps, factor, correction) in arms.items():
                for config in configs:
                    seeded = _seeded(problem, config.seed, config.step.lr * factor)
                    measured[task][name].append(_result(seeded, correction, steps, total // steps))
        return measured

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        lines = [
            [task, arm, *(over_seeds([seed[key] for seed in seeds]) for key in ("accuracy", "loss", "spread"))]
            for task, arms in results.measured.items()
            for arm, seeds in arms.items()
        ]
        return table(["task", "arm", "accuracy after", "validation loss", "spread of the clients in a round"], lines)

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        figure, axes = subplots(1, len(results.measured))
        for axis, (task, arms) in zip(axes, results.measured.items(), strict=True):
            for i, (arm, seeds) in enumerate(arms.items()):
                losses = [seed["loss"] for seed in seeds]
                steps = arm.split(",")[0]
                label = steps if arm.endswith(", none") else None  # one bar of each T in the legend
                axis.barh(-i, statistics.fmean(losses), color=_COLORS[steps], label=label)
                axis.plot(losses, [-i] * len(losses), "k.", markersize=4)
            axis.set(
                title=task, xlabel="validation loss", yticks=[-i for i in range(len(arms))], yticklabels=list(arms)
            )
        save_figure(figure, axes, path)


def _seeded(problem: Problem, seed: int, lr: float) -> Problem:
    """The problem with the examples of a seed, and a learning rate."""
    seeded = problem.with_seed(seed)
    return dataclasses.replace(seeded, config=seeded.config.replace(lr=lr))


def _result(problem: Problem, correction: Correction, local_steps: int, rounds: int) -> dict[str, float]:
    """Scores after training, and the mean spread of the clients at the end of a round."""
    walk = Rounds(problem, correction, local_steps)
    for number in range(rounds):
        walk.run(number)
    scored = problem.evaluate(walk.weights)
    return {"accuracy": scored.main[1], "loss": scored.loss, "spread": statistics.fmean(walk.spread)}


__all__ = ["Corrections"]
