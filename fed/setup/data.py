"""Builds the examples of a run from its settings: the task as tokens, and each client's share of it."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...engine.errors import ConfigError
from ...engine.lm import embedded
from ...engine.lm.data import AnyTask, custom_rows, stratified_sample, task_splits
from ...engine.lm.example_set import Examples
from ...engine.lm.examples import EncodedTask
from ...engine.lm.free_text.encoded import EncodedText
from ...engine.lm.free_text.rendering import Renderer
from ...engine.lm.models import LanguageModel, max_positions
from ...engine.lm.row_files import LocatedRows
from ...engine.lm.tasks import Task
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

    train: Examples
    validation: Examples
    groups: list[Group] | None = None

    def digest(self, shares: Sequence[Tensor]) -> str:
        """SHA-256 of all examples and of their partition, in hexadecimal.

        Args:
            shares: indices of each client's training examples.
        """
        examples = hashlib.sha256((self.train.digest + self.validation.digest).encode()).hexdigest()
        return hashlib.sha256((examples + json.dumps([share.tolist() for share in shares])).encode()).hexdigest()


def read_rows(config: RunConfig) -> tuple[AnyTask, LocatedRows, LocatedRows]:
    """Reads the run's task, its training rows and its validation rows."""
    task, data = config.task, config.data
    if data.file is not None:
        train, validation = custom_rows(task, data.file, data.validation, config.seed)
    elif not data.is_own and data.task in embedded.TASKS:
        train, validation = (
            LocatedRows(
                [dict(row) for row in rows], [f"{task.name}, {split}, example {i}" for i in range(1, len(rows) + 1)]
            )
            for split in ("train", "validation")
            for rows in [embedded.rows(split, data.task)]
        )
    else:
        train, validation = task_splits(task, None if data.is_own else data.directory, config.seed)
    return task, train, sample_rows(config, task, validation)


def sample_rows(config: RunConfig, task: AnyTask, validation: LocatedRows) -> LocatedRows:
    """The validation rows that ``eval_examples`` asks for: a sample by the seed, stratified by class."""
    if not config.evaluation.examples:
        return validation
    if isinstance(task, Task):
        labels = [task.class_of(row) for row in validation]
    else:
        values = ["" if task.class_field is None else str(row.get(task.class_field)) for row in validation]
        numbers = {value: i for i, value in enumerate(sorted(set(values)))}
        labels = [numbers[value] for value in values]
    return validation.select(stratified_sample(labels, config.evaluation.examples, config.seed))


def encode(config: RunConfig, lm: LanguageModel) -> TaskData:
    """Reads the run's examples, tokenizes them for a model, and chooses the layout of their batches."""
    task, train, validation = read_rows(config)
    data = TaskData(
        encode_rows(config, lm, train, f"{task.name}, train"),
        encode_rows(config, lm, validation, f"{task.name}, validation"),
    )
    if config.clients.partition is Partition.NATURAL and task.client_field is not None:
        kept = train.select(data.train.kept)
        groups = natural_client_names(kept, task.client_field, kept.places)
        data = dataclasses.replace(data, groups=groups)
    data.train.resolve_layout(config.step.layout, lm.model)
    data.validation.layout = data.train.layout
    return data


def encode_rows(config: RunConfig, lm: LanguageModel, rows: LocatedRows, name: str) -> Examples:
    """Tokenizes rows of the run's task.

    Args:
        config: the settings.
        lm: the model and its tokenizer.
        rows: the rows.
        name: name of the rows, for messages.
    """
    task, length, positions = config.task, config.data.max_length, max_positions(lm.model)
    if isinstance(task, Task):
        return EncodedTask(task, rows, lm.tokenizer, length, name, positions)
    return EncodedText(task, rows, rows.places, renderer(config, lm), length, name, positions)


def describe_examples(train: Examples, validation: Examples | None = None) -> list[str]:
    """Log lines about a run's examples: what they are, which rows were left out or cut, and how batches are laid out.

    Args:
        train: the training examples; their layout is resolved.
        validation: the held-out examples; None if there are none.
    """
    lines = [*train.overview, *(f"training data: {note}" for note in train.notes)]
    if validation is not None:
        lines += [f"held-out data: {note}" for note in validation.notes]
    if train.layout_reason:
        lines.append(f"batches are {train.layout}, not packed: {train.layout_reason}")
    return lines


def renderer(config: RunConfig, lm: LanguageModel) -> Renderer:
    """What makes tokens of the run's prompts and answers, for a task of free text.

    Raises:
        ConfigError: if the chat template cannot be read, or there is none and one is needed.
    """
    path = config.data.chat_template
    try:
        template = None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {path}: {error}") from error
    return Renderer(lm.tokenizer, template, config.data.prompt_format)


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
    for name in ("data_dir", "data", "validation", "chat_template", "mask", "calibration"):
        path = settings[name]
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{name} {str(path)!r} does not exist")


__all__ = [
    "TaskData",
    "check_files",
    "client_shares",
    "describe_examples",
    "encode",
    "encode_rows",
    "read_rows",
    "renderer",
    "sample_rows",
]
