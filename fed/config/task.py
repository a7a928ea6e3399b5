"""``choose_task``: the task of a run, which is the embedded one, a built-in one, or one for the user's own data."""

import dataclasses
from pathlib import Path

from ...engine.errors import ConfigError
from ...engine.lm import embedded
from ...engine.lm.data import AnyTask
from ...engine.lm.free_text.task import TextTask, text_task
from ...engine.lm.free_text.tasks import TEXT_TASKS
from ...engine.lm.hub import HubSource
from ...engine.lm.tasks import TASKS, Task, custom_task
from ..partition import Partition
from .sections import ClientsConfig, DataConfig

# Settings that only apply to the user's own data, and their defaults.
_OWN_DATA_DEFAULTS = {
    "validation": None,
    "config": None,
    "revision": None,
    "split": "train",
    "validation_split": None,
    "template": None,
    "labels": None,
    "label_field": None,
    "answer": None,
    "cut": None,
}
_OF_FILES, _OF_DATASETS = ("validation",), ("config", "revision", "split", "validation_split")
_BY_CLASS = (Partition.DIRICHLET, Partition.SINGLE_LABEL, Partition.MIXED)


def choose_task(data: DataConfig, clients: ClientsConfig, model: str) -> AnyTask:
    """The task of a run, with the field that names its natural clients.

    Args:
        data: the section ``[data]``.
        clients: the section ``[clients]``; its partition and field are read.
        model: value of ``--model``.

    Raises:
        ConfigError: if the settings do not name one task, or the task does not fit the model or the partition.
    """
    task = _own_task(data) if data.is_own else _built_in_task(data, model)
    if clients.field is not None:
        if clients.partition is not Partition.NATURAL:
            raise ConfigError("client_field is for natural clients; add --partition natural, or leave client_field out")
        task = dataclasses.replace(task, client_field=clients.field)
    if clients.partition is Partition.NATURAL and task.client_field is None:
        raise ConfigError(
            f"the task {task.name!r} defines no natural clients; "
            f"give --client-field, the field of the data that names the client of each example"
        )
    if isinstance(task, TextTask):
        if clients.partition in _BY_CLASS and task.class_field is None:
            raise ConfigError(
                f"the partition {clients.partition} deals examples by class, and the free text of {task.name!r} has no "
                f"classes; give --label-field, the field with the class, or --partition iid"
            )
    else:
        for name in ("chat_template", "prompt_format"):
            if getattr(data, name) != getattr(DataConfig, name):
                raise ConfigError(
                    f"{name} is for free text, and {task.name!r} chooses between label words; leave it out"
                )
    return task


def get_task(name: str) -> AnyTask:
    """The built-in task with a name, of classification or free text.

    Raises:
        ConfigError: if there is none; the message lists all names.
    """
    known: dict[str, AnyTask] = {**embedded.TASKS, **TASKS, **TEXT_TASKS}
    if name not in known:
        raise ConfigError(f"unknown task {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def _built_in_task(data: DataConfig, model: str) -> AnyTask:
    for name, default in _OWN_DATA_DEFAULTS.items():
        if getattr(data, name) != default:
            option = data.option(name)
            raise ConfigError(
                f"{option} is only for your own data; give --data FILE or --dataset NAME as well, or leave {option} out"
            )
    task = get_task(data.task)
    if (model == embedded.NAME) != (data.task in embedded.TASKS):
        raise ConfigError(
            f"the embedded model only works with its own tasks ({', '.join(embedded.TASKS)}), and these only with it: "
            f"give both --model and --task, or neither"
        )
    return task


def _own_task(data: DataConfig) -> AnyTask:
    if data.task != embedded.NAME:
        raise ConfigError("give --task or --data, not both: your own data are a task by themselves")
    if data.file is not None and data.dataset is not None:
        raise ConfigError("give --data FILE or --dataset NAME, not both")
    others, own = (_OF_DATASETS, "--data FILE") if data.file is not None else (_OF_FILES, "--dataset NAME")
    for name in others:
        if getattr(data, name) != _OWN_DATA_DEFAULTS[name]:
            raise ConfigError(f"{data.option(name)} does not go with {own}; leave it out")
    name = data.file.stem if data.file is not None else str(data.dataset).rstrip("/").rpartition("/")[2]
    task = _classification(data, name) if data.labels is not None else _free_text(data, name)
    return task if data.dataset is None else dataclasses.replace(task, hub=_hub(data))


def _classification(data: DataConfig, name: str) -> Task:
    if data.answer is not None:
        raise ConfigError("give --labels for a choice between label words, or --answer for free text, not both")
    if data.template is None or data.labels is None:
        raise ConfigError("--labels needs --template, the prompt that the label words follow")
    return custom_task(name, data.template, data.labels, label=data.label_field or "label", cut=data.cut)


def _free_text(data: DataConfig, name: str) -> TextTask:
    if data.cut is not None:
        raise ConfigError("cut is not for free text, whose prompts are cut at their beginning; leave it out")
    if data.template is not None and data.answer is None:
        raise ConfigError("--template needs --labels (label words, one per class) or --answer (free text) as well")
    return text_task(name, data.template, data.answer, class_field=data.label_field)


def _hub(data: DataConfig) -> HubSource:
    assert data.dataset is not None
    if data.revision is not None and Path(data.dataset).exists():
        raise ConfigError(f"{data.dataset} is a local directory, which has no revisions; leave dataset_revision out")
    return HubSource(
        path=data.dataset,
        config=data.config,
        revision=data.revision,
        train=data.split,
        validation=data.validation_split,
    )


__all__ = ["choose_task", "get_task"]
