"""Experiment (c), early stopping: Meerkat, Meerkat-vp and random stopping, and how well GradIP detects extreme clients.

References:
    Meerkat, arXiv 2506.03337, section 5 (virtual-path client selection and its ablation).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ...fed.config.run_config import RunConfig
from ..figures import mean_line, save_figure, subplots
from ..tables import over_seeds, table
from .experiment import Arm, Experiment, Results, Settings, task_setting
from .finished import FinishedRun

_METHODS = ("meerkat", "meerkat-vp", "random-stop")
_DETECTION = "detection"


class Selection(Experiment):
    """Meerkat, Meerkat-vp and random stopping on several tasks."""

    name = "selection"
    title = "Does stopping extreme clients early help, and does GradIP find them?"
    settings: ClassVar[Settings] = {"partition": "dirichlet", "alpha": 0.3, "clients": 10, "eval_every": 2}
    sets = ("method",)
    compares_tasks = True

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """Returns one arm per task and method, and per task a detection arm with 50% single-label clients."""
        compared = [
            Arm(name=f"{task}, {method}", settings={**task_setting(config, task), "method": method})
            for task in tasks
            for method in _METHODS
        ]
        mixed = {"method": "meerkat-vp", "partition": "mixed", "rounds": 1, "local_steps": 1}
        detection = [
            Arm(name=f"{task}, {_DETECTION}", settings={**task_setting(config, task), **mixed}) for task in tasks
        ]
        return compared + detection

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        lines = [
            [*arm.split(", "), over_seeds(results.after(arm)), _stopped(runs)]
            for arm, runs in results.arms.items()
            if not arm.endswith(_DETECTION)
        ]
        titles = " or ".join(dict.fromkeys(results.score_of(arm).title for arm in results.arms))
        return f"{table(['task', 'method', f'{titles} after', 'clients stopped'], lines)}\n\n{_detection(results)}"

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        tasks = list(dict.fromkeys(arm.split(", ")[0] for arm in results.arms))
        figure, axes = subplots(1, len(tasks))
        for axis, task in zip(axes, tasks, strict=True):
            for i, method in enumerate(_METHODS):
                mean_line(axis, [run.curve for run in results.arms[f"{task}, {method}"]], f"C{i}", method)
            axis.set(title=task, xlabel="round", ylabel=results.score_of(f"{task}, {_METHODS[0]}").axis)
        save_figure(figure, axes, path)


def _detection(results: Results) -> str:
    """Returns the table of how well the stopped clients match the single-label clients."""
    lines = []
    for arm, runs in results.arms.items():
        if arm.endswith(_DETECTION):
            summaries = [run.summary for run in runs]
            correct = sum(len(set(s["stopped"]) & set(s["single_label_clients"])) for s in summaries)
            flagged = sum(len(s["stopped"]) for s in summaries)
            single_label = sum(len(s["single_label_clients"]) for s in summaries)
            clients = sum(run.config["clients"] for run in runs)
            precision, recall = _ratio(correct, flagged), _ratio(correct, single_label)
            lines.append([arm.split(", ")[0], f"{single_label} of {clients}", str(flagged), precision, recall])
    return table(["task", "single-label clients, all seeds", "flagged", "precision", "recall"], lines)


def _ratio(part: int, total: int) -> str:
    return f"{part / total:.2f}" if total else "none"


def _stopped(runs: Sequence[FinishedRun]) -> str:
    """Returns the number of stopped clients of each run."""
    return ", ".join(str(len(run.summary.get("stopped", []))) for run in runs)


__all__ = ["Selection"]
