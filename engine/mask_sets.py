"""Masks made of other masks: a sparser one, and the union of several.

Clients may rank the elements by gradients of their own examples, and upload the ids in the order of their scores. The
server unites them: an element is in the union if a client chose it. The union of masks that differ is larger than each
of them. Cut to a density, it keeps the elements that the most clients chose, and of these the ones that they ranked
first; so it needs no scores, which have another scale at every client.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .eligible import element_count
from .errors import MaskError
from .mask import SparseMask


def sparser(mask: SparseMask, density: float) -> SparseMask:
    """Keeps the elements with the largest scores: the mask that the same choice with this density makes.

    Ties go to the lower id, as when a mask is chosen.

    Args:
        mask: a mask with scores.
        density: ``u`` of the result, in (0, ``mask.density``].

    Raises:
        MaskError: if the mask has no scores, or the density is out of range.
    """
    k = element_count(density, _candidates(mask))
    if k > len(mask):
        raise MaskError(f"a mask of density {mask.density:g} has no sparser one of density {density:g}")
    kept = _best_first(mask)[:k].sort().values
    return replace(
        mask,
        ids=mask.ids[kept],
        density=density,
        gradient=None if mask.gradient is None else mask.gradient[kept],
        scores=_scores(mask)[kept],
    )


def united(masks: Sequence[SparseMask], density: float | None = None) -> SparseMask:
    """Unites masks of one model.

    Args:
        masks: the masks, at least one; with a density, masks with scores. The order does not matter.
        density: ``u`` of the result, in (0, 1]: elements of more masks come first, then those with the smaller sum of
            ranks in these masks, then those with the lower id. None keeps all elements.

    Returns:
        The union, without scores and gradient. It has fewer elements than the density says if there are no more.

    Raises:
        MaskError: if there is no mask, the masks are of different models, the density is out of range, or a mask has
            no scores and a density is given.
    """
    if not masks:
        raise MaskError("a union needs at least one mask")
    first = masks[0]
    for number, mask in enumerate(masks[1:], 2):
        difference = first.table.difference(mask.table)
        if difference is not None:
            raise MaskError(f"masks 1 and {number} were made for different models: {difference}")
    ids, places, votes = torch.unique(torch.cat([mask.ids for mask in masks]), return_inverse=True, return_counts=True)
    candidates = _candidates(first)
    if density is not None:
        ranks = torch.zeros_like(ids).index_add_(0, places, torch.cat([_ranks(mask) for mask in masks]))
        order = ranks.sort(stable=True).indices
        order = order[votes[order].sort(stable=True, descending=True).indices]
        ids = ids[order[: element_count(density, candidates)]].sort().values
    return SparseMask(
        ids=ids,
        table=first.table,
        density=min(1.0, len(ids) / candidates),
        source=f"union of {len(masks)}, {' and '.join(sorted({mask.source for mask in masks}))}",
        calibration="; ".join(sorted({mask.calibration for mask in masks} - {""})),
    )


def _candidates(mask: SparseMask) -> int:
    """Number of elements that a mask was chosen from, as its density says it."""
    return min(mask.table.size, round(len(mask) / mask.density))


def _scores(mask: SparseMask) -> Tensor:
    """The mask's scores, float32 [k]."""
    if mask.scores is None:
        raise MaskError(
            f"the mask ({mask.source}) has no scores, so its elements have no order; choose one by the gradients of a "
            f"text or a task, or by magnitude"
        )
    return mask.scores


def _best_first(mask: SparseMask) -> Tensor:
    """Positions in ``mask.ids``, those with the largest scores first, int64 [k]. Ties: the lower id first."""
    return _scores(mask).sort(descending=True, stable=True).indices


def _ranks(mask: SparseMask) -> Tensor:
    """Rank of each element of a mask, 0 for the largest score, int64 [k] in the order of its ids."""
    order = _best_first(mask)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(mask), dtype=torch.int64, device="cpu")
    return ranks


__all__ = ["sparser", "united"]
