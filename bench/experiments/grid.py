"""Runs an experiment's arms, each with some seeds, into one directory; what is there already is not run again.

OUTPUT/runs/ARM/seed-S   run directories      OUTPUT/masks   masks that arms share      OUTPUT/measured-N.json
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
from ...fed.config.run_config import RunConfig, make_config
from ...fed.config.toml import config_toml, read_toml
from ...fed.methods import Elements
from ...fed.run.directory import CONFIG, GRADIP, METRICS, is_run
from ...fed.run.execute import execute, resume
from ...fed.run.jsonl import read_lines
from ...fed.setup.mask import make_mask
from ...fed.setup.model import load_language_model

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of an experiment.

    Args:
        name: unique within the experiment.
        settings: beside those all arms share.
    """

    name: str
    settings: Settings


@dataclass(frozen=True)
class Finished:
    """A run that is over."""

    directory: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """One a round, as in ``metrics.jsonl``."""
        return read_lines(self.directory / METRICS)[:-1]

    @property
    def config(self) -> dict[str, Any]:
        """Its settings, as in ``config.toml``."""
        return read_toml(self.directory / CONFIG)

    @property
    def summary(self) -> dict[str, Any]:
        """What it came to."""
        summary: dict[str, Any] = read_lines(self.directory / METRICS)[-1]["summary"]
        return summary

    @property
    def validation_loss(self) -> float:
        """At the end; infinite where the model was ruined."""
        found = self.summary["validation_loss_after"]
        return math.inf if found is None else float(found)

    @property
    def accuracies(self) -> list[tuple[float, float]]:
        """Round and accuracy, at each evaluation."""
        return [(float(line["round"]), float(line["accuracy"])) for line in self.lines if "accuracy" in line]

    @property
    def traces(self) -> list[dict[str, Any]]:
        """What the server saw of the clients' paths, one object a round."""
        return read_lines(self.directory / GRADIP)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All runs of an experiment, by arm, in the order of the seeds; and what was measured without a run."""

    arms: dict[str, list[Finished]]
    measured: Any

    def accuracy(self, arm: str) -> list[float]:
        """Accuracy after training, one a seed."""
        return [float(run.summary["accuracy_after"]) for run in self.arms[arm]]


class Experiment(ABC):
    """One experiment.

    Attributes:
        name: on the command line.
        title: a line that says what is asked.
        settings: of all arms, where the user gives none.
        sets: settings that the arms differ in, or that they cannot do without: the user may not give them.
        compares_tasks: whether it takes more than one task.
    """

    name: str
    title: str
    settings: ClassVar[Settings] = {}
    sets: ClassVar[tuple[str, ...]] = ()
    compares_tasks = False

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """The runs it needs, on some tasks (most experiments take the first)."""
        return ()

    def measure(self, configs: Sequence[RunConfig], tasks: Sequence[str]) -> Any:
        """What it measures without a run, one configuration a seed; ready for JSON."""
        return None

    @abstractmethod
    def table(self, results: Results) -> str:
        """The table, in Markdown."""

    @abstractmethod
    def draw(self, results: Results, path: Path) -> None:
        """Writes the figure."""


def run_all(
    experiment: Experiment,
    given: Settings,
    tasks: Sequence[str],
    seeds: int,
    output: Path,
    log: Callable[[str], None],
) -> Results:
    """Runs what is missing of an experiment.

    Args:
        experiment: which.
        given: the user's settings; they go before the experiment's.
        tasks: further ones, where the experiment compares tasks.
        seeds: runs of each arm; the first has the seed that is given, or 0.
        output: directory of the experiment, its own or a new one.
        log: called with a line before every run.

    Raises:
        ConfigError: if the directory holds another experiment, or one with other settings.
    """
    for name in experiment.sets:
        if name in given:
            raise ConfigError(f"the experiment {experiment.name} sets {name} itself; leave it out")
    shared = configuration(experiment, given)
    tasks = _tasks(experiment, shared, tasks)
    _claim(output, experiment, given, tasks)
    arms, first = experiment.arms(shared, tasks), shared.seed
    found: dict[str, list[Finished]] = {arm.name: [] for arm in arms}
    for arm in arms:
        for seed in range(first, first + seeds):
            directory = output / "runs" / _slug(arm.name) / f"seed-{seed}"
            if not directory.exists():
                log(f"{experiment.name}: {arm.name}, seed {seed}")
                config = configuration(experiment, given, {**arm.settings, "seed": seed})
                _run(config, directory, output / "masks")
            found[arm.name].append(Finished(directory))
    measured = output / f"measured-{seeds}.json"
    if not measured.exists():
        log(f"{experiment.name}: measuring")
        configs = [configuration(experiment, given, {"seed": seed}) for seed in range(first, first + seeds)]
        write_atomic(measured, json.dumps(experiment.measure(configs, tasks), indent=1).encode())
    return Results(arms=found, measured=json.loads(measured.read_text()))


def _tasks(experiment: Experiment, config: RunConfig, named: Sequence[str]) -> tuple[str, ...]:
    """The tasks to compare: those named, or all embedded ones, or the settings' own."""
    if len(named) > 1 and not experiment.compares_tasks:
        raise ConfigError(f"the experiment {experiment.name} takes one task, got {', '.join(named)}")
    every = tuple(embedded.TASKS) if experiment.compares_tasks and config.model.source == embedded.NAME else ()
    tasks = tuple(named) or every or (config.task.name,)
    for task in tasks:
        config.on_task(task)
    return tasks


def configuration(experiment: Experiment, given: Settings, of_arm: Settings | None = None) -> RunConfig:
    """The settings of one run; an arm's go first, then the user's, then the experiment's."""
    return make_config(experiment.settings, given, of_arm or {})


def _run(config: RunConfig, directory: Path, masks: Path) -> None:
    """Runs into a directory beside, which takes its name when the run is over."""
    unfinished = directory.with_name(directory.name + ".unfinished")
    if is_run(unfinished):  # left by an experiment that was stopped
        resume(unfinished, lambda _: None, lambda _: None)
    else:
        execute(_with_mask(config, masks), unfinished, lambda _: None, lambda _: None)
    unfinished.rename(directory)


def _with_mask(config: RunConfig, masks: Path) -> RunConfig:
    """The configuration with a mask file, where the mask does not depend on the seed: it is made once."""
    elements = config.method.recipe.elements
    if config.mask.file is not None or elements not in (Elements.SENSITIVITY, Elements.MAGNITUDE):
        return config
    path = masks / f"{elements}-{config.mask.density:g}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make_mask(config, load_language_model(config)).save(path)
    return config.replace(mask=path)


def _claim(output: Path, experiment: Experiment, given: Settings, tasks: Sequence[str]) -> None:
    """Makes the directory this experiment's, or checks that it is."""
    heading = f"# {experiment.name} on {', '.join(tasks)}"
    path, wanted = output / CONFIG, f"{heading}\n{config_toml(configuration(experiment, given))}"
    if path.exists():
        if path.read_text() != wanted:
            raise ConfigError(f"{output} holds an experiment with other settings (see {path}); choose another --output")
        return
    if output.exists() and any(output.iterdir()):
        raise RunError(f"{output} holds other files; choose another --output, nothing was changed")
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(path, wanted.encode())


def named(config: RunConfig, task: str) -> Settings:
    """The setting that chooses a task; data of the user's own need none."""
    return {} if config.data.file is not None else {"task": task}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-")


__all__ = ["Arm", "Experiment", "Finished", "Results", "Settings", "configuration", "named", "run_all"]
