"""Builds the mask of a run from its settings, and measures which share of a task's gradient a mask covers."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...engine import stream
from ...engine.errors import ConfigError, DataError
from ...engine.layers import decoder_layers, dominant_layer, parameter_names
from ...engine.lm import embedded
from ...engine.lm.batches import Item, TextBatch, text_batch
from ...engine.lm.data import calibration_file, calibration_texts, token_batches
from ...engine.lm.example_set import Examples
from ...engine.lm.layout import Layout, resolve_layout
from ...engine.lm.models import LanguageModel, max_positions
from ...engine.lm.objective import AnyBatch, task_loss
from ...engine.mask import SparseMask
from ...engine.mask_coverage import MaskCoverage, measure_coverage
from ..config.run_config import RunConfig
from ..methods import Elements
from .data import encode

# First word of ``SparseMask.source`` for each rule that chooses elements.
_SOURCES = {
    Elements.SENSITIVITY: "sensitivity",
    Elements.TASK: "task",
    Elements.MAGNITUDE: "magnitude",
    Elements.RANDOM: "random",
}


def make_mask(
    config: RunConfig, lm: LanguageModel, train: Examples | None = None, among: Tensor | None = None
) -> SparseMask:
    """The run's mask, read from its file or chosen by the rule of the method.

    Args:
        config: the settings.
        lm: the base model and its tokenizer.
        train: training examples of the task; needed if the method ranks elements by the task's gradients.
        among: indices of the training examples to choose on, those of a client for example, int64 [n]; None: all.
    """
    if config.mask.file is not None:
        return _from_file(config, lm.model)
    model, elements = lm.model, config.method.recipe.elements
    if elements is Elements.ALL:
        return SparseMask.dense(model, frozen=True)
    if elements is Elements.MAGNITUDE:
        return SparseMask.magnitude(model, config.mask.density, frozen=True)
    if elements is Elements.RANDOM:
        return SparseMask.random(model, config.mask.density, stream.derived_seed(config.seed, "mask"), frozen=True)
    if elements is Elements.LORA:
        return SparseMask.of_parameters(model, lm.adapters, f"lora, rank {config.lora.rank}")
    if elements is Elements.TASK:
        if train is None:
            raise ConfigError(f"{config.method} chooses its elements on a task's examples; give --task")
        return _task_mask(config, model, train, among)
    batches, calibration = calibration_batches(config, lm)
    if elements is Elements.LAYER:
        return _layer_mask(config, model, batches)
    return SparseMask.from_gradients(
        model, _WithProgressBar(batches), config.mask.density, calibration=calibration, frozen=True,
        at_a_time=config.mask.elements or None,
    )  # fmt: skip


def file_of_choice(config: RunConfig) -> Path | None:
    """The file that the choice of the mask depends on: the mask's own, or the calibration text; None if none does."""
    if config.mask.file is not None:
        return config.mask.file
    if config.method.recipe.elements not in (Elements.SENSITIVITY, Elements.LAYER) or _has_embedded_texts(config):
        return None
    return calibration_file(config.mask.calibration, config.data.directory)


def _from_file(config: RunConfig, model: nn.Module) -> SparseMask:
    assert config.mask.file is not None
    mask = SparseMask.load(config.mask.file, model)
    rule = next((elements for elements, source in _SOURCES.items() if mask.source.split(",")[0] == source), None)
    if rule not in (None, config.method.recipe.elements):
        raise ConfigError(
            f"the mask {config.mask.file} was chosen by {rule}, and {config.method} trains elements chosen by "
            f"{config.method.recipe.elements}; give the method of that name, or another mask"
        )
    return mask


def calibration_batches(config: RunConfig, lm: LanguageModel) -> tuple[list[dict[str, Tensor]] | list[TextBatch], str]:
    """The calibration text in batches, packed if the layout is, and a description of it in words.

    Raises:
        DataError: if there is no text, or a text has more tokens than the model has positions.
    """
    texts, description = _calibration_texts(config)
    size, length = config.mask.batch_size, config.mask.length
    batches = list(token_batches(texts, lm.tokenizer, size, length))
    longest, positions = max((batch["input_ids"].shape[1] for batch in batches), default=0), max_positions(lm.model)
    if positions is not None and longest > positions:
        raise DataError(
            f"{description}: the longest text has {longest} tokens, and the model has {positions} positions; give "
            f"--calibration-length {positions}"
        )
    description = f"{description}; batches of {size}, at most {length} tokens a text"
    texts_of_batches = [_texts(batch) for batch in batches]
    items = [Item(prompt=ids[:-1], answers=[ids[-1:]]) for of_batch in texts_of_batches for ids in of_batch]
    layout, _ = resolve_layout(config.step.layout, lm.model, items, lm.tokenizer.pad_token_id)
    if layout is not Layout.PACKED:
        return batches, description
    device = next(lm.model.parameters()).device
    return [text_batch(of_batch, device, max_positions(lm.model)) for of_batch in texts_of_batches], description


def _texts(batch: dict[str, Tensor]) -> list[npt.NDArray[np.int64]]:
    """Token ids of the texts of a padded batch, of those that have two tokens or more."""
    texts = [ids[mask.bool()].numpy() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return [text for text in texts if len(text) > 1]


def _task_batches(
    config: RunConfig, train: Examples, device: torch.device, part: int, among: Tensor | None = None
) -> list[AnyBatch]:
    """Batches of a task's examples, to take gradients of its loss.

    Args:
        config: the settings.
        train: training examples of the task.
        device: device of the batches.
        part: 0 for the examples that a mask is chosen on, 1 for the disjoint ones that masks are measured on.
        among: indices of the examples to draw from, int64 [n]; None: all.
    """
    total = len(train) if among is None else len(among)
    count = max(1, min(config.mask.texts, total // 2))
    order = stream.permutation(stream.derived_seed(config.seed, "task"), total)[part * count :][:count]
    order = order if among is None else among[order]
    size = config.mask.batch_size
    return [
        train.batch(indices.tolist(), answers=config.objective.answers, device=device) for indices in order.split(size)
    ]


def mask_coverage(config: RunConfig, lm: LanguageModel, masks: Sequence[SparseMask]) -> list[MaskCoverage]:
    """Measures which share of the squared gradient of the run's task each mask covers."""
    train = encode(config, lm).train
    batches = _task_batches(config, train, next(lm.model.parameters()).device, 1)
    return measure_coverage(
        masks, lm.model, _WithProgressBar(batches), lambda net, batch: task_loss(net, batch, config.objective)
    )


def _task_mask(config: RunConfig, model: nn.Module, train: Examples, among: Tensor | None) -> SparseMask:
    batches = _task_batches(config, train, next(model.parameters()).device, 0, among)
    mask = SparseMask.from_gradients(
        model,
        _WithProgressBar(batches),
        config.mask.density,
        loss=lambda net, batch: task_loss(net, batch, config.objective),
        source="task",
        calibration=f"{train.name}: {len(batches)} batches of {config.mask.batch_size}",
        frozen=True,
        at_a_time=config.mask.elements or None,
    )
    return dataclasses.replace(mask, gradient=None)  # GradIP is about the gradient on pre-training text


def _layer_mask(config: RunConfig, model: nn.Module, batches: Sequence[Any]) -> SparseMask:
    layer = config.mask.layer or dominant_layer(model, _WithProgressBar(batches))
    names = parameter_names(model, layer)
    if not names:
        raise ConfigError(
            f"layer {layer!r} has no parameters in this model; its blocks are {', '.join(decoder_layers(model))}"
        )
    return SparseMask.of_parameters(model, names, f"layer {layer}").with_gradient(model, batches)


class _WithProgressBar:
    """Batches that show a progress bar whenever they are read."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(tqdm(self._batches, desc="calibrating", unit="batch", leave=False, disable=None))


def _has_embedded_texts(config: RunConfig) -> bool:
    return config.model.source == embedded.NAME and config.mask.calibration is None


def _calibration_texts(config: RunConfig) -> tuple[list[str], str]:
    """The calibration texts, and a description of their source in words."""
    if _has_embedded_texts(config):
        return embedded.calibration_texts(config.mask.texts)
    return calibration_texts(config.mask.calibration, config.data.directory, config.mask.texts)


__all__ = ["calibration_batches", "file_of_choice", "make_mask", "mask_coverage"]
