"""Runs the arms of an experiment, each with several seeds, into one directory. Finished runs are not repeated.

OUTPUT/config.toml        the experiment's settings
OUTPUT/runs/ARM/seed-S    run directories
OUTPUT/masks              masks that the runs share
OUTPUT/measured-N.json    the result of ``Experiment.measure`` for N seeds
"""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...engine.atomic_files import write_atomic
from ...engine.errors import ConfigError, RunError
from ...engine.lm import embedded
from ...engine.lm.scores import LOSS, SCORES, Score, scores_in, shown
from ...fed.config.run_config import RunConfig, make_config
from ...fed.config.toml import config_toml, read_toml
from ...fed.ledger.file import read_ledger
from ...fed.methods import Elements
from ...fed.run.directory import CONFIG, LEDGER, METRICS, is_run
from ...fed.run.execute import execute, resume
from ...fed.run.gradip_file import read_gradip
from ...fed.run.jsonl import read_lines
from ...fed.setup.mask import make_mask
from ...fed.setup.model import load_language_model

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One configuration of an experiment, run once per seed.

    Args:
        name: the arm's name, unique within the experiment.
        settings: settings of this arm; they override those that all arms share.
    """

    name: str
    settings: Settings


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Args:
        directory: the run directory.
    """

    directory: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The metrics of each round, as in ``metrics.jsonl``."""
        return read_lines(self.directory / METRICS)[:-1]

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings by their flat names (the names of the options)."""
        return read_toml(self.directory / CONFIG)

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary."""
        summary: dict[str, Any] = read_lines(self.directory / METRICS)[-1]["summary"]
        return summary

    @property
    def main_score(self) -> str:
        """Name of the score that the task is judged by; see ``scores.shown``."""
        return shown(scores_in(self.summary, "_after"))[0]

    @property
    def before(self) -> float:
        """The main score before training; infinite if it was not finite."""
        return _number(self.summary[f"{self.main_score}_before"])

    @property
    def after(self) -> float:
        """The main score after training; infinite if the run diverged."""
        return _number(self.summary[f"{self.main_score}_after"])

    @property
    def validation_loss(self) -> float:
        """The validation loss after training; infinite if the run diverged."""
        return _number(self.summary[f"{LOSS}_after"])

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Pairs (round, main score), one per evaluation; infinite where the score was not finite."""
        name = self.main_score
        return [(float(line["round"]), _number(line[name])) for line in self.lines if name in line]

    @property
    def traces(self) -> list[dict[str, Any]]:
        """GradIP, gradient norm and cosine of the clients, one object per round, as in ``gradip.jsonl``."""
        return read_gradip(self.directory, read_ledger(self.directory / LEDGER))


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


def _number(value: float | None) -> float:
    """A score from JSON, where null stands for one that is not finite."""
    return math.inf if value is None else float(value)


class Experiment(ABC):
    """An experiment: a grid of runs, a table and a figure.

    Attributes:
        name: name on the command line.
        title: the question that the experiment answers, in one line.
        settings: default settings of all arms; the user's settings override them.
        sets: names of settings that the experiment sets itself; the user may not set them.
        compares_tasks: whether the experiment accepts more than one task.
    """

    name: str
    title: str
    settings: ClassVar[Settings] = {}
    sets: ClassVar[tuple[str, ...]] = ()
    compares_tasks = False

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

    @abstractmethod
    def table(self, results: Results) -> str:
        """Returns the experiment's tables in Markdown."""

    @abstractmethod
    def draw(self, results: Results, path: Path) -> None:
        """Writes the figure to ``path``."""


def run_all(
    experiment: Experiment,
    given: Settings,
    tasks: Sequence[str],
    seeds: int,
    output: Path,
    log: Callable[[str], None],
) -> Results:
    """Runs the missing runs of an experiment and returns the results of all.

    Args:
        experiment: the experiment.
        given: the user's settings; they override the experiment's.
        tasks: the tasks to compare; empty for the experiment's default.
        seeds: number of runs per arm. Their seeds are consecutive and start at the configured seed (default 0).
        output: the experiment's directory: new, empty, or from an earlier call with the same settings.
        log: called with a line of text before each run and before the measurement.

    Raises:
        ConfigError: if the user sets a setting that the experiment sets itself, or the directory belongs to an
            experiment with other settings.
        RunError: if the directory holds other files.
    """
    for name in experiment.sets:
        if name in given:
            raise ConfigError(f"the experiment {experiment.name} sets {name} itself; do not set it")
    shared = configuration(experiment, given)
    tasks = _choose_tasks(experiment, shared, tasks)
    _prepare_directory(output, experiment, given, tasks)
    arms = experiment.arms(shared, tasks)
    all_seeds = range(shared.seed, shared.seed + seeds)
    runs: dict[str, list[FinishedRun]] = {arm.name: [] for arm in arms}
    for arm in arms:
        for seed in all_seeds:
            directory = output / "runs" / _slug(arm.name) / f"seed-{seed}"
            if not directory.exists():
                log(f"{experiment.name}: {arm.name}, seed {seed}")
                config = configuration(experiment, given, {**arm.settings, "seed": seed})
                _run(config, directory, output / "masks")
            runs[arm.name].append(FinishedRun(directory))
    measured = output / f"measured-{seeds}.json"
    if not measured.exists():
        log(f"{experiment.name}: measuring")
        configs = [configuration(experiment, given, {"seed": seed}) for seed in all_seeds]
        write_atomic(measured, json.dumps(experiment.measure(configs, tasks), indent=1).encode())
    return Results(arms=runs, measured=json.loads(measured.read_text()))


def _choose_tasks(experiment: Experiment, config: RunConfig, given: Sequence[str]) -> tuple[str, ...]:
    """Returns the tasks to run on.

    They are the given ones. By default, an experiment that compares tasks runs on all embedded tasks if the model is
    the embedded one; all others run on the configured task.
    """
    if len(given) > 1 and not experiment.compares_tasks:
        raise ConfigError(f"the experiment {experiment.name} takes one task, got {', '.join(given)}")
    if given:
        tasks = tuple(given)
    elif experiment.compares_tasks and config.model.source == embedded.NAME:
        tasks = tuple(embedded.TASKS)
    else:
        tasks = (config.task.name,)
    for task in tasks:
        config.on_task(task)  # raises ConfigError if the task does not fit the settings
    return tasks


def configuration(experiment: Experiment, given: Settings, arm_settings: Settings | None = None) -> RunConfig:
    """Returns the configuration of a run: the arm's settings override the user's, which override the experiment's."""
    return make_config(experiment.settings, given, arm_settings or {})


def _run(config: RunConfig, directory: Path, masks: Path) -> None:
    """Runs in ``DIRECTORY.unfinished`` and renames it to ``directory`` when the run has finished."""
    unfinished = directory.with_name(directory.name + ".unfinished")
    if is_run(unfinished):  # an earlier call was interrupted
        resume(unfinished, lambda _: None, lambda _: None)
    else:
        execute(_with_mask(config, masks), unfinished, lambda _: None, lambda _: None)
    unfinished.rename(directory)


def _with_mask(config: RunConfig, masks: Path) -> RunConfig:
    """Returns the configuration with a mask file if the mask does not depend on the seed. The file is made once."""
    elements = config.method.recipe.elements
    if config.mask.file is not None or elements not in (Elements.SENSITIVITY, Elements.MAGNITUDE):
        return config
    path = masks / f"{elements}-{config.mask.density:g}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make_mask(config, load_language_model(config)).save(path)
    return config.replace(mask=path)


def _prepare_directory(output: Path, experiment: Experiment, given: Settings, tasks: Sequence[str]) -> None:
    """Creates the experiment's directory with a settings file, or checks that an existing one has the same settings."""
    heading = f"# {experiment.name} on {', '.join(tasks)}"
    path, content = output / CONFIG, f"{heading}\n{config_toml(configuration(experiment, given))}"
    if path.exists():
        if path.read_text() != content:
            raise ConfigError(f"{output} holds an experiment with other settings (see {path}); choose another --output")
        return
    if output.exists() and any(output.iterdir()):
        raise RunError(f"{output} holds other files; choose another --output (nothing was changed)")
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.encode())


def task_setting(config: RunConfig, task: str) -> Settings:
    """Returns the setting that selects a task; none if the user gives a data file instead of a task."""
    return {} if config.data.file is not None else {"task": task}


def _slug(name: str) -> str:
    """Returns an arm's name as a directory name."""
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-")


__all__ = ["Arm", "Experiment", "FinishedRun", "Results", "Settings", "configuration", "run_all", "task_setting"]
