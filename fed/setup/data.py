"""Builds the examples of a run from its settings: the task as tokens, and each client's share of it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...engine.errors import ConfigError
from ...engine.lm import embedded
from ...engine.lm.data import custom_rows, stratified_sample, task_rows
from ...engine.lm.examples import EncodedTask
from ...engine.lm.models import LanguageModel, max_positions
from ...engine.lm.tasks import Row, Task
from ..config.run_config import RunConfig
from ..partition import Group, Partition, natural_client_names, split


@dataclass(frozen=True)
class TaskData:
    """Training and validation examples of the run's task.

    Args:
        train: training examples, which are dealt to the clients.
        validation: held-out examples.
        groups: name of the client of each training example, in the data; None unless the partition is natural.
    """

    train: EncodedTask
    validation: EncodedTask
    groups: list[Group] | None = None

    def digest(self, shares: Sequence[Tensor]) -> str:
        """SHA-256 of all examples and of their partition, in hexadecimal.

        Args:
            shares: indices of each client's training examples.
        """
        examples = hashlib.sha256((self.train.digest + self.validation.digest).encode()).hexdigest()
        return hashlib.sha256((examples + json.dumps([share.tolist() for share in shares])).encode()).hexdigest()


def read_rows(config: RunConfig) -> tuple[Task, Sequence[Row], Sequence[Row]]:
    """Reads the run's task, its training rows and its validation rows."""
    task = config.task
    train: Sequence[Row]
    validation: Sequence[Row]
    if config.data.file is not None:
        train, validation = custom_rows(task, config.data.file, config.data.validation, config.seed)
    elif config.data.task in embedded.TASKS:
        train, validation = embedded.rows("train", config.data.task), embedded.rows("validation", config.data.task)
    else:
        train = task_rows(task, "train", config.data.directory)
        validation = task_rows(task, "validation", config.data.directory)
    return task, train, _sample(config, task, validation)


def _sample(config: RunConfig, task: Task, validation: Sequence[Row]) -> Sequence[Row]:
    """The validation rows that ``eval_examples`` asks for: a sample by the seed, stratified by class."""
    if not config.evaluation.examples:
        return validation
    labels = [task.class_of(row) for row in validation]
    return [validation[i] for i in stratified_sample(labels, config.evaluation.examples, config.seed)]


def encode(config: RunConfig, lm: LanguageModel) -> TaskData:
    """Reads the run's examples, tokenizes them for a model, and chooses the layout of their batches."""
    task, train, validation = read_rows(config)
    groups = None
    if config.clients.partition is Partition.NATURAL and task.client_field is not None:
        groups = natural_client_names(train, task.client_field, f"{task.name}, train")
    length, positions = config.data.max_length, max_positions(lm.model)
    data = TaskData(
        EncodedTask(task, train, lm.tokenizer, length, f"{task.name}, train", positions),
        EncodedTask(task, validation, lm.tokenizer, length, f"{task.name}, validation", positions),
        groups,
    )
    data.train.resolve_layout(config.step.layout, lm.model)
    data.validation.layout = data.train.layout
    return data


def client_shares(config: RunConfig, data: TaskData) -> list[Tensor]:
    """Deals the training examples to the clients. Returns each client's indices: int64, ascending."""
    return split(
        data.train.labels,
        config.clients.count,
        config.clients.partition,
        config.seed,
        alpha=config.clients.alpha,
        at_least=config.step.batch_size,
        groups=data.groups,
    )


def check_files(config: RunConfig) -> None:
    """Raises ``ConfigError`` if the settings name a file or directory that does not exist. Call it before slow work."""
    settings = config.flat()
    for name in ("data_dir", "data", "validation", "mask", "calibration"):
        path = settings[name]
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{name} {str(path)!r} does not exist")


__all__ = ["TaskData", "check_files", "client_shares", "encode", "read_rows"]
