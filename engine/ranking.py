"""The most sensitive elements of a model, with the gradients of a bounded number of elements at a time.

Squared gradients of all elements take as much memory as the model, or twice that. So parameters are taken in groups of
consecutive ones, each group in a pass over the batches of its own, and only its best elements are kept.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .eligible import base_ids, values_at_ids
from .errors import MaskError
from .parameters import ParameterTable
from .sensitivity import LossFunction, accumulate_gradients, select_largest


@dataclass(frozen=True)
class Ranked:
    """The elements with the largest scores.

    Args:
        ids: element ids, ascending, int64 [k] on the CPU.
        scores: mean squared gradient of each, float32 [k] on the CPU.
        gradient: mean gradient of each, float32 [k] on the CPU.
        batches: number of batches in the means.
    """

    ids: Tensor
    scores: Tensor
    gradient: Tensor
    batches: int


def most_sensitive(
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction | None,
    k: int,
    names: Collection[str],
    *,
    at_a_time: int | None = None,
) -> Ranked:
    """Finds the k elements with the largest mean squared gradient over batches. Ties go to the lower id.

    The result has the same bits whatever ``at_a_time`` is. Time: a forward and a backward pass over all batches for
    each group; a backward pass ends at the first parameter of its group.

    Memory besides the model and the activations: 8 bytes for each of ``at_a_time`` elements, or for each of the largest
    parameter if that has more; what ``accumulate_gradients`` needs besides; 32 bytes for each of the k elements, and
    then what ``select_largest`` needs for two k elements.

    Args:
        model: the model, see ``accumulate_gradients``.
        batches: calibration batches, see ``accumulate_gradients``; they are read once for each group, and an iterator,
            which can be read once only, is first made a list.
        loss: loss function, see ``accumulate_gradients``.
        k: number of elements, from 1 to that of the named parameters.
        names: names of the parameters to choose from.
        at_a_time: number of elements whose gradients are accumulated at a time; None: all.

    Raises:
        MaskError: if ``at_a_time`` is less than 1, the number of batches changes from one pass to the next, or see
            ``accumulate_gradients``.
        ModelError: see ``accumulate_gradients``.
    """
    if at_a_time is not None and at_a_time < 1:
        raise MaskError(f"at_a_time must be at least 1, got {at_a_time}")
    table = ParameterTable.of(model)
    groups = list(_groups(table, names, at_a_time))
    if len(groups) > 1 and isinstance(batches, Iterator):
        batches = list(batches)
    among = names if len(groups) > 1 else None
    best, reached = None, False
    for group in groups:
        found, reaches = _best_of(model, batches, loss, k, table, group, among)
        reached |= reaches
        best = found if best is None else _merged(best, found, k)
    if best is None or not reached:
        raise MaskError("the loss on the calibration batches does not depend on the chosen parameters")
    return best


def _groups(table: ParameterTable, names: Collection[str], at_a_time: int | None) -> Iterator[list[str]]:
    """Yields groups of parameters that have elements, in id order: at most that many elements, or one parameter."""
    group: list[str] = []
    count = 0
    for name, shape in zip(table.names, table.shapes, strict=True):
        size = torch.Size(shape).numel()
        if name not in names or not size:
            continue
        if group and at_a_time is not None and count + size > at_a_time:
            yield group
            group, count = [], 0
        group.append(name)
        count += size
    if group:
        yield group


def _best_of(
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction | None,
    k: int,
    table: ParameterTable,
    group: list[str],
    among: Collection[str] | None,
) -> tuple[Ranked, bool]:
    """The best elements of a group, all of them if there are fewer than k; and whether a loss depends on the group."""
    gradients = accumulate_gradients(model, batches, loss, group, among=among)
    squares = list(gradients.squares.values())
    k = min(k, sum(square.numel() for square in squares))
    ids, scores = select_largest(squares, k, bases=base_ids(table, group))
    ranked = Ranked(ids, scores, values_at_ids(gradients.means, table, ids), gradients.batches)
    return ranked, bool(gradients.reached)


def _merged(first: Ranked, second: Ranked, k: int) -> Ranked:
    """The k best of two groups, or all if there are fewer.

    Args:
        first: the best of a group.
        second: the best of another one, whose ids are all larger.
        k: number of elements.

    Raises:
        MaskError: if they were ranked on different numbers of batches.
    """
    if first.batches != second.batches:
        raise MaskError(
            f"there were {first.batches} calibration batches in one pass and {second.batches} in the next; give a list"
        )
    ids, scores, gradient = (
        torch.cat(pair)
        for pair in ((first.ids, second.ids), (first.scores, second.scores), (first.gradient, second.gradient))
    )
    at, scores = select_largest([scores], min(k, ids.numel()))
    return Ranked(ids[at], scores, gradient[at], first.batches)


__all__ = ["Ranked", "most_sensitive"]
