"""Runs the arms of an experiment, each with several seeds, into one directory. Finished runs are not repeated.

OUTPUT/config.toml              the experiment's settings
OUTPUT/records/ARM/seed-S.json  finished runs, see ``finished``; all that tables and figures need
OUTPUT/runs/ARM/seed-S          their run directories, which may be deleted
OUTPUT/rates, OUTPUT/searches   learning rates that were searched for, see ``rates``
OUTPUT/masks                    masks that the runs share
OUTPUT/measured-N.json          the result of ``Experiment.measure`` for N seeds

Several processes may work on one directory: each takes a run that no other one is at, and waits for the others at the
end.
"""

import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...engine.atomic_files import write_atomic
from ...engine.errors import ConfigError, RunError
from ...engine.lm import embedded
from ...fed.config.run_config import RunConfig, make_config
from ...fed.config.toml import config_toml, read_toml
from ...fed.run.directory import CONFIG
from .experiment import Arm, Experiment, Results, Settings, configuration
from .runs import Runs


def run_all(
    experiment: Experiment,
    given: Settings,
    tasks: Sequence[str],
    seeds: int,
    output: Path,
    log: Callable[[str], None],
    only: Sequence[str] = (),
) -> Results | None:
    """Runs the missing runs of an experiment and returns the results of all.

    Args:
        experiment: the experiment.
        given: the user's settings; they override the experiment's.
        tasks: the tasks to compare; empty for the experiment's default.
        seeds: number of runs per arm. Their seeds are consecutive and start at the configured seed (default 0).
        output: the experiment's directory: new, empty, or from an earlier call with the same settings.
        log: called with a line of text before each run and before the measurement.
        only: patterns with ``*``: runs only arms whose name one of them matches; empty: all.

    Returns:
        The results; None if there are too few runs for the experiment's tables.

    Raises:
        ConfigError: if the user sets a setting that the experiment sets itself, the directory belongs to an
            experiment with other settings, or no arm matches a pattern.
        RunError: if the directory holds other files.
    """
    for name in experiment.sets:
        if name in given:
            raise ConfigError(f"the experiment {experiment.name} sets {name} itself; do not set it")
    shared = configuration(experiment, given)
    tasks = _choose_tasks(experiment, shared, tasks)
    arms = experiment.arms(shared, tasks)
    chosen = _chosen(arms, only)
    _prepare_directory(output, experiment, given, tasks)
    seeds_of_arms = range(shared.seed, shared.seed + seeds)
    runs = Runs(experiment, given, output, log)
    runs.make([(arm, seed) for arm in chosen for seed in seeds_of_arms])
    finished = {arm.name: runs.finished(arm) for arm in arms}
    if not experiment.takes_part:
        if any(seed not in of_arm for of_arm in finished.values() for seed in seeds_of_arms):
            return None
        finished = {name: {seed: of_arm[seed] for seed in seeds_of_arms} for name, of_arm in finished.items()}
    configs = [configuration(experiment, given, {"seed": seed}) for seed in seeds_of_arms]
    return Results(
        arms={name: list(of_arm.values()) for name, of_arm in finished.items() if of_arm},
        measured=_measured(experiment, configs, tasks, output, log),
    )


def _chosen(arms: Sequence[Arm], only: Sequence[str]) -> list[Arm]:
    """Returns the arms whose names match one of the patterns; all if there are no patterns."""
    names = [arm.name for arm in arms]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"no arm matches {pattern!r}; the arms are: {'; '.join(names)}")
    return [arm for arm in arms if not only or any(fnmatchcase(arm.name, pattern) for pattern in only)]


def _measured(
    experiment: Experiment, configs: Sequence[RunConfig], tasks: Sequence[str], output: Path, log: Callable[[str], None]
) -> Any:
    """Returns the result of ``Experiment.measure``, from the file of an earlier call if there is one."""
    path = output / f"measured-{len(configs)}.json"
    if not path.exists() and type(experiment).measure is not Experiment.measure:
        log(f"{experiment.name}: measuring")
        write_atomic(path, json.dumps(experiment.measure(configs, tasks), indent=1).encode())
    return json.loads(path.read_bytes()) if path.exists() else None


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


def _prepare_directory(output: Path, experiment: Experiment, given: Settings, tasks: Sequence[str]) -> None:
    """Creates the experiment's directory with a settings file, or checks that an existing one has the same settings."""
    heading = f"# {experiment.name} on {', '.join(tasks)}"
    config = configuration(experiment, given)
    path, content = output / CONFIG, f"{heading}\n{config_toml(config)}"
    if path.exists():
        first = path.read_text().partition("\n")[0]
        if first != heading or make_config(read_toml(path)) != config:  # a newer version may have more settings
            raise ConfigError(f"{output} holds an experiment with other settings (see {path}); choose another --output")
        return
    # Hidden files may be those of another process that starts on the directory now.
    if output.exists() and any(not path.name.startswith(".") for path in output.iterdir()):
        raise RunError(f"{output} holds other files; choose another --output (nothing was changed)")
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.encode())


__all__ = ["run_all"]
