"""Experiment (c), early stopping: Meerkat, Meerkat-vp and random stopping, and how well GradIP detects extreme clients.

Where rounds are long, clients of one label drift far, so there is something to gain by stopping them. The experiment
has few long rounds, and ends before the six-class task is learned.

References:
    Meerkat, arXiv 2506.03337, section 5 (virtual-path client selection and its ablation).
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...engine.lm import embedded
from ...fed.aggregation import StoppedWeight
from ...fed.config.run_config import RunConfig
from ...fed.selection import NullPaths
from ..figures import save_figure, subplots
from ..tables import over_seeds, table
from .experiment import Arm, Experiment, Results, Settings, task_setting
from .finished import FinishedRun
from .paired import paired_difference

_PARTITIONS: Mapping[str, Settings] = {
    "mixed": {"partition": "mixed"},
    "Dirichlet 0.5": {"partition": "dirichlet", "alpha": 0.5},
    "Dirichlet 0.1": {"partition": "dirichlet", "alpha": 0.1},
}
_MEERKAT, _VP = "meerkat", "meerkat-vp"
# Meerkat as Meerkat-vp with thresholds that no client exceeds. The calibration moves each client on in its data: so all
# arms of a seed have the same batches, and differ only in what is stopped.
_NONE_STOPPED = {"method": _VP, "vp_rho_later": 0.0, "vp_rho_quie": 1.0, "vp_sigma": 0.0}
_METHODS: Mapping[str, Settings] = {_MEERKAT: _NONE_STOPPED} | {
    f"{method}, {weight}": {"method": method, "stopped_weight": weight}
    for method in (_VP, "random-stop")
    for weight in StoppedWeight
}
_FLAGS = f"{_VP}, {StoppedWeight.KEEP}"  # the arm whose stopped clients are compared in all arms
_DETECTION, _CALIBRATIONS = "detection", (50, 100)
_COMPARED = {"half": "at half of the rounds", "after": "after"}


class Selection(Experiment):
    """Meerkat, Meerkat-vp and random stopping, with weights kept and shared, for three partitions."""

    name = "selection"
    title = "Does stopping extreme clients early help, and does GradIP find them?"
    settings: ClassVar[Settings] = {
        "clients": 10, "rounds": 2, "local_steps": 50, "lr": 2e-2, "eval_every": 1,
        "vp_steps": 50, "vp_initial": 10, "vp_later": 25,
    }  # fmt: skip
    sets = ("method", "partition", "alpha", "stopped_weight", "vp_null")
    compares_tasks = True
    takes_part = True

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """Returns an arm per task, partition and method, and per task the detection arms with 50% one-label clients."""
        compared = [
            Arm(name=f"{task}; {name}; {method}", settings={**task_setting(config, task), **partition, **settings})
            for task in tasks
            for name, partition in _PARTITIONS.items()
            # two classes cannot be dealt to ten clients by Dirichlet 0.1 so that each has a batch
            if (task, name) != (embedded.NAME, "Dirichlet 0.1")
            for method, settings in _METHODS.items()
        ]
        one_step = {"method": _VP, "partition": "mixed", "rounds": 1, "local_steps": 1}
        detection = [
            Arm(
                name=f"{task}; {_DETECTION}; {steps}; {source}",
                settings={**task_setting(config, task), **one_step, **_windows(steps), "vp_null": source},
            )
            for task in tasks
            for steps in _CALIBRATIONS
            for source in NullPaths
        ]
        return compared + detection

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        lines = [_line(results, *arm.split("; ")) for arm in results.arms if _DETECTION not in arm]
        score = " or ".join(dict.fromkeys(results.score_of(arm).title for arm in results.arms))
        columns = ["task", "partition", "method", *(f"{score} {title}" for title in _COMPARED.values()),
                   "minus meerkat at half", "minus meerkat after", "own accuracy of the worst client",
                   "of the clients that vp stops", "clients stopped"]  # fmt: skip
        parts = [table(columns, lines)] if lines else []
        return "\n\n".join([*parts, *filter(None, (_held(results), _detection(results)))])

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        settings = list(dict.fromkeys(arm.rsplit("; ", 1)[0] for arm in results.arms if _DETECTION not in arm))
        figure, axes = subplots(1, max(1, len(settings)))
        for axis, setting in zip(axes, settings, strict=False):
            for i, (when, title) in enumerate(_COMPARED.items()):
                points = [
                    (number, _score(run, when))
                    for number, method in enumerate(_METHODS)
                    for run in results.arms.get(f"{setting}; {method}", [])
                ]
                axis.scatter(*zip(*points, strict=True), color=f"C{i}", label=title, alpha=0.7)
            axis.set_xticks(range(len(_METHODS)), list(_METHODS), rotation=30, ha="right", fontsize=8)
            axis.set(title=setting, ylabel=results.score.axis)
        save_figure(figure, axes, path)


def _windows(steps: int) -> Settings:
    """Settings of a calibration: the first fifth of its steps is compared with the last half."""
    return {"vp_steps": steps, "vp_initial": steps // 5, "vp_later": steps // 2}


def _score(run: FinishedRun, when: str) -> float:
    """The main score after training, or at half of the rounds."""
    if when == "after":
        return run.after
    half = run.config["rounds"] / 2
    return next(value for round, value in run.curve if round >= half)


def _line(results: Results, task: str, partition: str, method: str) -> list[str]:
    """A line of the first table."""
    runs = results.arms[f"{task}; {partition}; {method}"]
    meerkat = results.arms.get(f"{task}; {partition}; {_MEERKAT}", [])
    flagging = results.arms.get(f"{task}; {partition}; {_FLAGS}", [])
    flagged = {run.config["seed"]: run.summary["stopped"] for run in flagging}
    own = [
        statistics.fmean(run.summary["client_accuracy"][i] for i in stopped)
        for run in runs
        if "client_accuracy" in run.summary and (stopped := flagged.get(run.config["seed"]))
    ]
    worst = [run.summary["client_accuracy_worst"] for run in runs if "client_accuracy_worst" in run.summary]
    return [
        task,
        partition,
        method,
        *(over_seeds([_score(run, when) for run in runs]) for when in _COMPARED),
        *("" if method == _MEERKAT else _minus(runs, meerkat, when) for when in _COMPARED),
        over_seeds(worst) if worst else "",
        over_seeds(own) if own else "none",
        ", ".join(str(len(run.summary.get("stopped", []))) for run in runs),
    ]


def _minus(runs: Sequence[FinishedRun], others: Sequence[FinishedRun], when: str) -> str:
    """The mean difference of two arms, paired by seed, with its 95% interval."""
    difference = paired_difference(runs, others, lambda run: _score(run, when))
    if difference is None:
        return ""
    interval = "" if difference.seeds == 1 else f" ± {difference.half_width:.3f}"
    return f"{difference.mean:+.3f}{interval}{' *' if difference.excludes_zero else ''}"


def _held(results: Results) -> str:
    """Returns a sentence with the largest share of a class that the stopped clients hold, by setting."""
    found = [
        f"{arm.rsplit('; ', 1)[0]}: {over_seeds([_largest_share(run.summary) for run in runs], 2)}"
        for arm, runs in results.arms.items()
        if arm.endswith(f"; {_FLAGS}")
    ]
    return (
        f"`*`: the 95% interval over seeds excludes 0. Largest share of a class's examples that the clients stopped by "
        f"{_VP} hold: {', '.join(found)}."
        if found
        else ""
    )


def _largest_share(summary: Mapping[str, Any]) -> float:
    by_class = zip(*summary["examples_by_client_and_label"], strict=True)
    shares: list[float] = [sum(counts[i] for i in summary["stopped"]) / sum(counts) for counts in by_class]
    return max(shares)


def _detection(results: Results) -> str:
    """Returns the table of how well the stopped clients match the one-label clients; empty if there is none."""
    lines = []
    for arm, runs in results.arms.items():
        if _DETECTION in arm:
            task, _, steps, source = arm.split("; ")
            summaries = [run.summary for run in runs]
            correct = sum(len(set(s["stopped"]) & set(s["single_label_clients"])) for s in summaries)
            flagged = sum(len(s["stopped"]) for s in summaries)
            single_label = sum(len(s["single_label_clients"]) for s in summaries)
            clients = sum(run.config["clients"] for run in runs)
            quality = _ratio(correct, flagged), _ratio(correct, single_label)
            lines.append([task, steps, source, f"{single_label} of {clients}", str(flagged), *quality])
    columns = ["task", "T_cali", "null paths", "single-label clients, all seeds", "flagged", "precision", "recall"]
    return table(columns, lines) if lines else ""


def _ratio(part: int, total: int) -> str:
    return f"{part / total:.2f}" if total else "none"


__all__ = ["Selection"]
