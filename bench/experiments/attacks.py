"""Experiment (g), hostile clients: accuracy for each attack and aggregation rule. It is not in the paper.

References:
    Yin et al., arXiv 1803.01498 (median and trimmed mean).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ...engine.errors import ConfigError
from ...fed.aggregation import Rule
from ...fed.attack import Attack
from ...fed.config.run_config import RunConfig
from ..figures import mean_line, save_figure, subplots
from ..tables import over_seeds, table
from .experiment import Arm, Experiment, Results, Settings

_CLIPPED = "clip, then mean"
_CLEAN = f"{Rule.MEAN}, {Attack.NONE}"


class Attacks(Experiment):
    """Every attack against every aggregation rule, and against the mean of clipped scalars."""

    name = "attacks"
    title = "What do hostile clients cost, and which aggregation rule withstands them?"
    settings: ClassVar[Settings] = {"clients": 10, "attack": "sign-flip", "attackers": 2, "clip": 5.0}
    sets = ("attack", "aggregation")

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """Returns one arm per rule and attack."""
        if not config.aggregation.clip:
            raise ConfigError(f"the experiment {self.name} also runs with clipped scalars; set --clip above 0")
        rules: dict[str, Settings] = {}
        for rule in Rule:
            config.replace(aggregation=rule)  # raises ConfigError before any run if the rule does not fit the settings
            rules[rule] = {"aggregation": rule, "clip": 0.0}
        rules[_CLIPPED] = {"clip": config.aggregation.clip}
        return [
            Arm(
                name=f"{rule}, {attack}",
                settings={
                    **settings,
                    "attack": attack,
                    "attackers": config.attack.clients if attack != Attack.NONE else 0,
                },
            )
            for rule, settings in rules.items()
            for attack in Attack
        ]

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        clean, lines, score = results.after(_CLEAN), [], results.score
        unit = 100 if score.higher_is_better else -1  # accuracy in points
        for arm, runs in results.arms.items():
            after = results.after(arm)
            lost = max(unit * (without - attacked) for without, attacked in zip(clean, after, strict=True))
            losses = [run.validation_loss for run in runs]
            loss = over_seeds(losses) if max(losses) < 1000 else f"up to {max(losses):.2g}"
            rejected = ", ".join(str(sum(run.summary["rejected_messages"].values())) for run in runs)
            lines.append([*arm.rsplit(", ", 1), over_seeds(after), f"{lost:.2f}", loss, rejected])
        columns = [
            "rule",
            "attack",
            f"{score.title} after",
            "points lost, worst seed" if score.higher_is_better else "more than without attack, worst seed",
            "validation loss",
            "messages rejected",
        ]
        return table(columns, lines)

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        figure, axes = subplots(1, len(Attack), sharey=True)
        for axis, attack in zip(axes, Attack, strict=True):
            for i, rule in enumerate((*Rule, _CLIPPED)):
                mean_line(axis, [run.curve for run in results.arms[f"{rule}, {attack}"]], f"C{i}", rule)
            axis.set(title=f"attack: {attack}", xlabel="round")
        axes[0].set_ylabel(results.score.axis)
        save_figure(figure, axes, path)


__all__ = ["Attacks"]
