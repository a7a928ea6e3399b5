"""``choose_task``: the task of a run, which is the embedded one, a built-in one, or one for the user's own data."""

import dataclasses

from ...engine.errors import ConfigError
from ...engine.lm import embedded
from ...engine.lm.tasks import Task, custom_task, get_task
from ..partition import Partition
from .sections import ClientsConfig, DataConfig

# Settings that only apply to the user's own data, and their defaults.
_CUSTOM_DATA_DEFAULTS = {"validation": None, "template": None, "labels": None, "label_field": "label", "cut": None}


def choose_task(data: DataConfig, clients: ClientsConfig, model: str) -> Task:
    """The task of a run, with the field that names its natural clients.

    Args:
        data: the section ``[data]``.
        clients: the section ``[clients]``; its partition and field are read.
        model: value of ``--model``.

    Raises:
        ConfigError: if the settings do not name one task, or the task does not fit the model or the partition.
    """
    task = _custom_task(data, model) if data.file is not None else _built_in_task(data, model)
    if clients.field is not None:
        if clients.partition is not Partition.NATURAL:
            raise ConfigError("client_field is for natural clients; add --partition natural, or leave client_field out")
        task = dataclasses.replace(task, client_field=clients.field)
    if clients.partition is Partition.NATURAL and task.client_field is None:
        raise ConfigError(
            f"the task {task.name!r} defines no natural clients; "
            f"give --client-field, the field of the data that names the client of each example"
        )
    return task


def _built_in_task(data: DataConfig, model: str) -> Task:
    for name, default in _CUSTOM_DATA_DEFAULTS.items():
        if getattr(data, name) != default:
            raise ConfigError(f"{name} is only for your own data; give --data FILE as well, or leave {name} out")
    task = embedded.TASKS[data.task] if data.task in embedded.TASKS else get_task(data.task)
    if (model == embedded.NAME) != (data.task in embedded.TASKS):
        raise ConfigError(
            f"the embedded model only works with its own tasks ({', '.join(embedded.TASKS)}), and these only with it: "
            f"give both --model and --task, or neither"
        )
    return task


def _custom_task(data: DataConfig, model: str) -> Task:
    assert data.file is not None
    if data.task != embedded.NAME:
        raise ConfigError("give --task or --data, not both: your own data are a task by themselves")
    if data.template is None or data.labels is None:
        raise ConfigError("--data needs --template (the prompt) and --labels (the label words) as well")
    if model == embedded.NAME:
        raise ConfigError("--data needs --model: the embedded model only knows the words of its own task")
    return custom_task(data.file.stem, data.template, data.labels, label=data.label_field, cut=data.cut)


__all__ = ["choose_task"]
