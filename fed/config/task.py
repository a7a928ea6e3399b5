"""Which task some settings mean: the embedded one, a known one, or one for the user's own data."""

import dataclasses

from ...engine.errors import ConfigError
from ...engine.lm import embedded
from ...engine.lm.tasks import Task, custom_task, get_task
from ..partition import Partition
from .sections import ClientsConfig, DataConfig

# Settings that go with data of the user's own, and what they are when not given.
_OWN = {"validation": None, "template": None, "labels": None, "label_field": "label", "cut": None}


def choose_task(data: DataConfig, clients: ClientsConfig, model: str) -> Task:
    """The task of a run, with the field that names its natural clients.

    Args:
        data: which task, or data of the user's own.
        clients: for their partition.
        model: as ``--model`` takes it.

    Raises:
        ConfigError: if the settings do not name one task, or it does not fit the model or the partition.
    """
    task = _custom_task(data, model) if data.file is not None else _known_task(data, model)
    if clients.field is not None:
        if clients.partition is not Partition.NATURAL:
            raise ConfigError("client_field is for natural clients; add --partition natural, or leave it out")
        task = dataclasses.replace(task, client_field=clients.field)
    if clients.partition is Partition.NATURAL and task.client_field is None:
        raise ConfigError(
            f"the task {task.name!r} has no natural clients of its own; "
            f"give --client-field, the field of the data that names the client of each example"
        )
    return task


def _known_task(data: DataConfig, model: str) -> Task:
    for name, default in _OWN.items():
        if getattr(data, name) != default:
            raise ConfigError(f"{name} describes data of your own; give --data as well")
    task = embedded.TASKS[data.task] if data.task in embedded.TASKS else get_task(data.task)
    if (model == embedded.NAME) != (data.task in embedded.TASKS):
        raise ConfigError(
            f"the embedded model and its tasks ({', '.join(embedded.TASKS)}) go together: "
            f"give both --model and --task, or neither"
        )
    return task


def _custom_task(data: DataConfig, model: str) -> Task:
    assert data.file is not None
    if data.task != embedded.NAME:
        raise ConfigError("give --task or --data, not both: data of your own are a task of their own")
    if data.template is None or data.labels is None:
        raise ConfigError("--data needs --template (the prompt) and --labels (its answers) as well")
    if model == embedded.NAME:
        raise ConfigError("--data needs --model: the embedded model knows no words but those of its own task")
    return custom_task(data.file.stem, data.template, data.labels, label=data.label_field, cut=data.cut)


__all__ = ["choose_task"]
