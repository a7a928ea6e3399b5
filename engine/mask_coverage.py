"""Does a mask transfer? What it holds of a task's squared gradient, before any training.

    captured = sum of s_j over the mask / sum of s_j over the model,    s_j = mean squared gradient of the task's loss

Beside it stand the best mask of that size (the task's own) and chance (the density).

References:
    Meerkat, arXiv 2506.03337, section 3; SensZOQ, arXiv 2406.02913 (sensitive elements are shared between tasks).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import sensitivity
from .gradients import LossFunction
from .mask import SparseMask, values_at_ids
from .sensitivity import Sensitivity


@dataclass(frozen=True, kw_only=True)
class MaskCoverage:
    """How much of a task a mask reaches.

    Args:
        captured: share of the task's squared gradient within the mask, in [0, 1].
        best: the same for the best mask of that size, which the task's own gradients choose.
        chance: the same for a random mask of that size, on average: its density.
        overlap: share of the mask's elements that the best mask holds too.
    """

    captured: float
    best: float
    chance: float
    overlap: float


def measure_coverage(
    masks: Iterable[SparseMask], model: nn.Module, batches: Iterable[Any], loss: LossFunction
) -> list[MaskCoverage]:
    """Measures some masks of one model on one task.

    Args:
        masks: of the model.
        model: left as it was; 8 bytes an element of accumulators beside it.
        batches: of the task, as ``loss`` takes them.
        loss: of the model on one batch.

    Raises:
        MaskError: if a mask is another model's, or a gradient is not finite.
    """
    masks = list(masks)
    for mask in masks:
        mask.check(model)
    found = sensitivity.accumulate(model, batches, loss)
    total = sum(float(square.sum(dtype=torch.float64)) for square in found.squares)
    return [_of(mask, found, total) for mask in masks]


def _of(mask: SparseMask, found: Sensitivity, total: float) -> MaskCoverage:
    count = len(mask.table.names)
    best, scores = sensitivity.largest(lambda i: found.squares[i].view(-1), count, len(mask))
    return MaskCoverage(
        captured=float(values_at_ids(found.squares, mask.table, mask.ids).sum(dtype=torch.float64)) / total,
        best=float(scores.sum(dtype=torch.float64)) / total,
        chance=len(mask) / mask.table.size,
        overlap=float(torch.isin(mask.ids, best, assume_unique=True).double().mean()),
    )


def concentration(found: Sensitivity, top: float = 1e-3, rest: float = 1e-2) -> float:
    """Mean squared gradient of the ``top`` share of the elements over that of the next ones up to ``rest``.

    Args:
        found: accumulators of a calibration.
        top: share in (0, 1).
        rest: share in (top, 1].

    References:
        Meerkat, arXiv 2506.03337, section 3: 52 for the top 0.1% over the next 0.9%.
    """
    size = sum(square.numel() for square in found.squares)
    few, many = max(1, round(top * size)), round(rest * size)
    if not few < many <= size:
        raise ValueError(f"shares {top:g} and {rest:g} of {size} elements leave none between them")
    _, scores = sensitivity.largest(lambda i: found.squares[i].view(-1), len(found.squares), many)
    ranked = scores.double().sort(descending=True).values
    return float(ranked[:few].mean() / ranked[few:].mean())


__all__ = ["MaskCoverage", "concentration", "measure_coverage"]
