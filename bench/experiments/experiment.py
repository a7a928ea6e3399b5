"""``Experiment``: a question, the arms that answer it, its tables and its figure."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...engine.lm.scores import SCORES, Score
from ...fed.config.run_config import RunConfig, make_config
from .finished import FinishedRun
from .rates import Search

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One configuration of an experiment, run once per seed.

    Args:
        name: the arm's name, unique within the experiment.
        settings: settings of this arm; they override those that all arms share.
        search: the search that the arm's learning rate comes from; None: it is among the settings.
    """

    name: str
    settings: Settings
    search: Search | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of an experiment.

    Args:
        arms: finished runs by name of the arm, in the order of the seeds.
        measured: the result of ``Experiment.measure``, as read from JSON.
    """

    arms: dict[str, list[FinishedRun]]
    measured: Any

    @property
    def score(self) -> Score:
        """The score that the task is judged by: that of the first arm, where arms have different tasks."""
        return self.score_of(next(iter(self.arms)))

    def score_of(self, arm: str) -> Score:
        """Returns the score that the task of an arm is judged by."""
        return SCORES[self.arms[arm][0].main_score]

    def after(self, arm: str) -> list[float]:
        """Returns the main score after training of an arm's runs, one per seed."""
        return [run.after for run in self.arms[arm]]

    def not_scored(self) -> str:
        """Returns a sentence about the runs in which held-out examples had no finite score; empty if there are none."""
        summaries = {
            f"{arm} (run {i})": run.summary for arm, runs in self.arms.items() for i, run in enumerate(runs, 1)
        }
        found = [
            f"{name}: {summary['nonfinite_after']} of {summary['validation_examples']}"
            for name, summary in summaries.items()
            if summary.get("nonfinite_after")
        ]
        return (
            f"Held-out examples without finite scores, {self.score.if_not_finite}: {'; '.join(found)}." if found else ""
        )


class Experiment(ABC):
    """An experiment: a grid of runs, a table and a figure.

    Attributes:
        name: name on the command line.
        title: the question that the experiment answers, in one line.
        settings: default settings of all arms; the user's settings override them.
        sets: names of settings that the experiment sets itself; the user may not set them.
        compares_tasks: whether the experiment accepts more than one task.
        takes_part: whether the tables can be made of the runs that are there, whatever their arms and seeds.
    """

    name: str
    title: str
    settings: ClassVar[Settings] = {}
    sets: ClassVar[tuple[str, ...]] = ()
    compares_tasks = False
    takes_part = False

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """Returns the arms to run.

        Args:
            config: the settings that all arms share.
            tasks: the tasks; exactly one unless the experiment compares tasks.
        """
        return ()

    def measure(self, configs: Sequence[RunConfig], tasks: Sequence[str]) -> Any:
        """Returns results that need no run, ready for JSON.

        Args:
            configs: one configuration per seed.
            tasks: the tasks.
        """
        return None

    def extra(self, directory: Path) -> Any:
        """Returns what tables and figures need of a finished run besides its metrics, ready for JSON.

        Args:
            directory: the run directory.
        """
        return None

    @abstractmethod
    def table(self, results: Results) -> str:
        """Returns the experiment's tables in Markdown."""

    @abstractmethod
    def draw(self, results: Results, path: Path) -> None:
        """Writes the figure to ``path``."""


def configuration(experiment: Experiment, given: Settings, arm_settings: Settings | None = None) -> RunConfig:
    """Returns the configuration of a run: the arm's settings override the user's, which override the experiment's."""
    return make_config(experiment.settings, given, arm_settings or {})


def task_setting(config: RunConfig, task: str) -> Settings:
    """Returns the setting that selects a task; none if the user gives a data file instead of a task."""
    return {} if config.data.file is not None else {"task": task}


def slug(name: str) -> str:
    """Returns an arm's name as the name of its files."""
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-")


__all__ = ["Arm", "Experiment", "Results", "Search", "Settings", "configuration", "slug", "task_setting"]
