"""Coverage of a task by a mask: the share of the task's squared gradient in the mask, measured before training.

    captured = sum of s_j over the mask / sum of s_j over the model,    s_j = mean squared gradient of the task's loss

It is compared with the best mask of that size (chosen from the task's gradients) and with chance (the density).

References:
    Meerkat, arXiv 2506.03337, section 3; SensZOQ, arXiv 2406.02913 (sensitive elements are shared between tasks).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import sensitivity
from .eligible import values_at_ids
from .gradients import LossFunction
from .mask import SparseMask
from .sensitivity import Sensitivity


@dataclass(frozen=True, kw_only=True)
class MaskCoverage:
    """Coverage of one task by one mask.

    Args:
        captured: share of the task's squared gradient in the mask, in [0, 1].
        best: the same share for the best mask of that size, which is chosen from the task's own gradients.
        chance: expected share for a random mask of that size: the mask's density.
        overlap: share of the mask's elements that are also in the best mask, in [0, 1].
    """

    captured: float
    best: float
    chance: float
    overlap: float


def measure_coverage(
    masks: Iterable[SparseMask], model: nn.Module, batches: Iterable[Any], loss: LossFunction
) -> list[MaskCoverage]:
    """Measures the coverage of one task by several masks of one model.

    Args:
        masks: masks made for the model.
        model: the model; unchanged afterwards. The accumulators need 8 bytes per element.
        batches: batches of the task, inputs of ``loss``.
        loss: computes the model's loss on one batch, a scalar.

    Returns:
        The coverage of each mask, in order.

    Raises:
        MaskError: if a mask was made for another model, or a gradient is not finite.
    """
    masks = list(masks)
    for mask in masks:
        mask.check(model)
    task_gradients = sensitivity.accumulate_gradients(model, batches, loss)
    total = sum(float(square.sum(dtype=torch.float64)) for square in task_gradients.squares.values())
    return [_coverage(mask, task_gradients, total) for mask in masks]


def _coverage(mask: SparseMask, task_gradients: Sensitivity, total: float) -> MaskCoverage:
    squares = task_gradients.squares
    best, scores = sensitivity.select_largest(list(squares.values()), len(mask))
    return MaskCoverage(
        captured=float(values_at_ids(squares, mask.table, mask.ids).sum(dtype=torch.float64)) / total,
        best=float(scores.sum(dtype=torch.float64)) / total,
        chance=len(mask) / mask.table.size,
        overlap=float(torch.isin(mask.ids, best, assume_unique=True).double().mean()),
    )


def concentration(gradients: Sensitivity, top: float = 1e-3, rest: float = 1e-2) -> float:
    """Ratio of mean squared gradients: the ``top`` share of the elements over the next ones, up to the ``rest`` share.

    Args:
        gradients: accumulated gradients of a calibration.
        top: share of the top elements, in (0, 1).
        rest: share at which the next elements end, in (top, 1].

    Raises:
        ValueError: if the two shares leave no elements between them.

    References:
        Meerkat, arXiv 2506.03337, section 3: 52 for the top 0.1% over the next 0.9%.
    """
    squares = list(gradients.squares.values())
    size = sum(square.numel() for square in squares)
    few, many = max(1, round(top * size)), round(rest * size)
    if not few < many <= size:
        raise ValueError(f"shares {top:g} and {rest:g} of {size} elements leave none between them")
    _, scores = sensitivity.select_largest(squares, many)
    largest = scores.double().sort(descending=True).values
    return float(largest[:few].mean() / largest[few:].mean())


__all__ = ["MaskCoverage", "concentration", "measure_coverage"]
