"""Which task a run's settings mean: the embedded one, a known one, or one for the user's own data."""

import dataclasses
from typing import TYPE_CHECKING

from ...engine.errors import ConfigError
from ...engine.lm import embedded
from ...engine.lm.tasks import Task, get_task, own_task
from ..partition import Partition

if TYPE_CHECKING:
    from .run_config import RunConfig

# Settings that go with data of the user's own, and what they are when not given.
_OWN = {"validation": None, "template": None, "labels": None, "label_field": "label", "cut": None}


def chosen_task(config: "RunConfig") -> Task:
    """The task that some settings mean, with the field that names the natural clients.

    Raises:
        ConfigError: if the settings do not name one task, or it does not fit the model or the partition.
    """
    task = _task(config)
    if config.client_field is not None:
        if config.partition is not Partition.NATURAL:
            raise ConfigError("client_field is for natural clients; add --partition natural, or leave it out")
        task = dataclasses.replace(task, client_field=config.client_field)
    if config.partition is Partition.NATURAL and task.client_field is None:
        raise ConfigError(
            f"the task {task.name!r} has no natural clients of its own; "
            f"give --client-field, the field of the data that names the client of each example"
        )
    return task


def _task(config: "RunConfig") -> Task:
    if config.data is not None:
        return _own_task(config)
    for name, default in _OWN.items():
        if getattr(config, name) != default:
            raise ConfigError(f"{name} describes data of your own; give --data as well")
    task = embedded.TASKS[config.task] if config.task in embedded.TASKS else get_task(config.task)
    if (config.model == embedded.NAME) != (config.task in embedded.TASKS):
        raise ConfigError(
            f"the embedded model and its tasks ({', '.join(embedded.TASKS)}) go together: "
            f"give both --model and --task, or neither"
        )
    return task


def _own_task(config: "RunConfig") -> Task:
    assert config.data is not None
    if config.task != embedded.NAME:
        raise ConfigError("give --task or --data, not both: data of your own are a task of their own")
    if config.template is None or config.labels is None:
        raise ConfigError("--data needs --template (the prompt) and --labels (its answers) as well")
    if config.model == embedded.NAME:
        raise ConfigError("--data needs --model: the embedded model knows no words but those of its own task")
    return own_task(config.data.stem, config.template, config.labels, label=config.label_field, cut=config.cut)


def on_task(config: "RunConfig", task: str) -> "RunConfig":
    """The settings with another task; data of the user's own are the only task of theirs.

    Raises:
        ConfigError: if the task is unknown, does not fit the model, or is not the user's own data.
    """
    if config.data is None:
        return dataclasses.replace(config, task=task)
    own = chosen_task(config).name
    if task != own:
        raise ConfigError(f"with --data the task is {own!r}, after the file; got {task!r}")
    return config


__all__ = ["chosen_task", "on_task"]
