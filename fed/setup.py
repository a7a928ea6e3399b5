"""From settings to the things a run consists of: model, data, mask."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import embedded, stream
from ..data import calibration_texts, own_rows, task_rows, token_batches
from ..errors import ConfigError
from ..examples import Batch, EncodedTask
from ..layers import decoder_layers, dominant_layer, parameters_of
from ..lora import add_lora
from ..mask import SparseMask
from ..models import DTYPES, LanguageModel, load_model
from ..objective import Objective, task_loss
from ..tasks import Row, Task
from ..transfer import Transfer, transfer
from .config import RunConfig
from .methods import Elements
from .partition import Group, Partition, groups_of
from .task_choice import chosen_task


@dataclass(frozen=True)
class TaskData:
    """Training and validation examples of the run's task.

    Args:
        train: to be dealt to clients.
        validation: held out.
        groups: what the data call the client of each training example, where clients are natural; else None.
    """

    train: EncodedTask
    validation: EncodedTask
    groups: list[Group] | None = None


def load_language_model(config: RunConfig) -> LanguageModel:
    """The run's model, with its adapters if the method trains these, and its tokenizer."""
    dtype = DTYPES[config.dtype]
    embedding = config.model == embedded.NAME
    lm = embedded.load(dtype, config.device) if embedding else load_model(config.model, dtype, config.device)
    if config.method.recipe.elements is Elements.LORA:
        targets = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
        seed = stream.derived_seed(config.seed, "lora")
        added = add_lora(lm.model, rank=config.lora_rank, alpha=config.lora_alpha, targets=targets, seed=seed)
        return dataclasses.replace(lm, adapters=tuple(added))
    return lm


def read_rows(config: RunConfig) -> tuple[Task, Sequence[Row], Sequence[Row]]:
    """The run's task, and its training and validation rows."""
    task = chosen_task(config)
    train: Sequence[Row]
    validation: Sequence[Row]
    if config.data is not None:
        train, validation = own_rows(task, config.data, config.validation, config.seed)
    elif config.task in embedded.TASKS:
        train, validation = embedded.rows("train", config.task), embedded.rows("validation", config.task)
    else:
        train = task_rows(task, "train", config.data_dir)
        validation = task_rows(task, "validation", config.data_dir)
    return task, train, validation[: config.eval_examples or None]


def encode(config: RunConfig, tokenizer: object) -> TaskData:
    """The run's examples as tokens."""
    task, train, validation = read_rows(config)
    groups = None
    if config.partition is Partition.NATURAL and task.client_field is not None:
        groups = groups_of(train, task.client_field, f"{task.name}, train")
    return TaskData(
        EncodedTask(task, train, tokenizer, config.max_length, f"{task.name}, train"),
        EncodedTask(task, validation, tokenizer, config.max_length, f"{task.name}, validation"),
        groups,
    )


def make_mask(config: RunConfig, lm: LanguageModel, train: EncodedTask | None = None) -> SparseMask:
    """The run's mask: read from its file, or chosen as the method says.

    Args:
        config: the settings.
        lm: the model.
        train: the task's examples, for the method that ranks elements by them.
    """
    if config.mask is not None:
        return SparseMask.load(config.mask, lm.model)
    model, elements = lm.model, config.method.recipe.elements
    if elements is Elements.ALL:
        return SparseMask.dense(model)
    if elements is Elements.MAGNITUDE:
        return SparseMask.magnitude(model, config.density)
    if elements is Elements.RANDOM:
        return SparseMask.random(model, config.density, stream.derived_seed(config.seed, "mask"))
    if elements is Elements.LORA:
        return SparseMask.of_parameters(model, lm.adapters, f"lora, rank {config.lora_rank}")
    if elements is Elements.TASK:
        if train is None:
            raise ConfigError(f"{config.method} chooses its elements on a task's examples; give --task")
        return _task_mask(config, model, train)
    batches, calibration = calibration_batches(config, lm)
    if elements is Elements.LAYER:
        return _layer_mask(config, model, batches)
    return SparseMask.from_gradients(model, _shown(batches), config.density, calibration=calibration)


def calibration_batches(config: RunConfig, lm: LanguageModel) -> tuple[list[dict[str, Tensor]], str]:
    """Pre-training text in batches, and what it is in words."""
    texts, where = _texts(config)
    size, length = config.calibration_batch_size, config.calibration_length
    batches = list(token_batches(texts, lm.tokenizer, size, length))
    return batches, f"{where}; batches of {size}, at most {length} tokens a text"


def _task_batches(config: RunConfig, train: EncodedTask, device: torch.device) -> list[Batch]:
    """The first of a task's examples in a random order, in batches, for gradients of the task's loss."""
    order = stream.permutation(stream.derived_seed(config.seed, "task"), len(train))[: config.calibration_texts]
    answers = "all" if config.objective is Objective.CANDIDATES else "gold"
    size = config.calibration_batch_size
    return [train.batch(part.tolist(), answers=answers, device=device) for part in order.split(size)]


def reach(config: RunConfig, lm: LanguageModel, masks: Sequence[SparseMask]) -> list[Transfer]:
    """What some masks hold of the squared gradient of the run's task."""
    train = encode(config, lm.tokenizer).train
    batches = _task_batches(config, train, next(lm.model.parameters()).device)
    return transfer(masks, lm.model, _shown(batches), lambda net, batch: task_loss(net, batch, config.objective))


def _task_mask(config: RunConfig, model: nn.Module, train: EncodedTask) -> SparseMask:
    batches = _task_batches(config, train, next(model.parameters()).device)
    return SparseMask.from_gradients(
        model,
        _shown(batches),
        config.density,
        loss=lambda net, batch: task_loss(net, batch, config.objective),
        source="task",
        calibration=f"{train.task.name}: {len(batches)} batches of {config.calibration_batch_size}",
    )


def _layer_mask(config: RunConfig, model: nn.Module, batches: list[dict[str, Tensor]]) -> SparseMask:
    layer = config.layer or dominant_layer(model, _shown(batches))
    names = parameters_of(model, layer)
    if not names:
        raise ConfigError(
            f"layer {layer!r} has no parameters in this model; its blocks are {', '.join(decoder_layers(model))}"
        )
    return SparseMask.of_parameters(model, names, f"layer {layer}").with_gradient(model, batches)


def _shown(batches: Sequence[Any]) -> Iterable[Any]:
    shown: Iterable[Any] = tqdm(batches, desc="calibrating", unit="batch", leave=False, disable=None)
    return shown


def _texts(config: RunConfig) -> tuple[list[str], str]:
    if config.model == embedded.NAME and config.calibration is None:
        return embedded.calibration_texts(config.calibration_texts)
    return calibration_texts(config.calibration, config.data_dir, config.calibration_texts)


def check_files(config: RunConfig) -> None:
    """Raises ``ConfigError`` for a file or directory that was named and is not there, before anything slow begins."""
    for name in ("data_dir", "data", "validation", "mask", "calibration"):
        path = getattr(config, name)
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{name} {str(path)!r} does not exist")


__all__ = [
    "TaskData",
    "calibration_batches",
    "check_files",
    "encode",
    "load_language_model",
    "make_mask",
    "reach",
    "read_rows",
]
