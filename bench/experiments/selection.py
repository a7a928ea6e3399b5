"""(c) Early stopping: Meerkat, Meerkat-vp and as many clients stopped at random; and how well GradIP finds them.

Reference: Meerkat, arXiv 2506.03337, section 5 (VPCS and its ablation).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ...fed.config.run_config import RunConfig
from ..tables import over_seeds, table
from .figures import finished, mean_line, subplots
from .grid import Arm, Experiment, Finished, Results, Settings, named

_METHODS = ("meerkat", "meerkat-vp", "random-stop")
_DETECTION = "detection"


class Selection(Experiment):
    """Meerkat, Meerkat-vp and random stopping over several tasks."""

    name = "selection"
    title = "Does stopping extreme clients early help, and does GradIP find them?"
    settings: ClassVar[Settings] = {"partition": "dirichlet", "alpha": 0.3, "clients": 10, "eval_every": 2}
    sets = ("method",)
    compares_tasks = True

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """A task and a method each, and a detection on clients half of which hold one label only."""
        compared = [
            Arm(name=f"{task}, {method}", settings={**named(config, task), "method": method})
            for task in tasks
            for method in _METHODS
        ]
        found = {"method": "meerkat-vp", "partition": "mixed", "rounds": 1, "local_steps": 1}
        detected = [Arm(name=f"{task}, {_DETECTION}", settings={**named(config, task), **found}) for task in tasks]
        return compared + detected

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        lines = [
            [*arm.split(", "), over_seeds(results.accuracy(arm)), _stopped(runs)]
            for arm, runs in results.arms.items()
            if not arm.endswith(_DETECTION)
        ]
        return f"{table(['task', 'method', 'accuracy after', 'clients stopped'], lines)}\n\n{_detection(results)}"

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        tasks = list(dict.fromkeys(arm.split(", ")[0] for arm in results.arms))
        figure, axes = subplots(1, len(tasks))
        for axis, task in zip(axes, tasks, strict=True):
            for i, method in enumerate(_METHODS):
                mean_line(axis, [run.accuracies for run in results.arms[f"{task}, {method}"]], f"C{i}", method)
            axis.set(title=task, xlabel="round")
        axes[0].set_ylabel("accuracy on held-out examples")
        finished(figure, axes, path)


def _detection(results: Results) -> str:
    lines = []
    for arm, runs in results.arms.items():
        if arm.endswith(_DETECTION):
            found = [run.summary for run in runs]
            right = sum(len(set(s["stopped"]) & set(s["single_label_clients"])) for s in found)
            flagged, single = (sum(len(s[key]) for s in found) for key in ("stopped", "single_label_clients"))
            clients = sum(run.config["clients"] for run in runs)
            quality = [_share(right, flagged), _share(right, single)]
            lines.append([arm.split(", ")[0], f"{single} of {clients}", str(flagged), *quality])
    return table(["task", "single-label clients, all seeds", "flagged", "precision", "recall"], lines)


def _share(right: int, of: int) -> str:
    return f"{right / of:.2f}" if of else "none"


def _stopped(runs: Sequence[Finished]) -> str:
    return ", ".join(str(len(run.summary.get("stopped", []))) for run in runs)


__all__ = ["Selection"]
