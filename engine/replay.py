"""``replay``: the end of a run from its base model and a few scalars."""

import math
from collections.abc import Iterable

from torch import nn

from .mask import SparseMask
from .weights import MaskedWeights


def replay(
    model: nn.Module, mask: SparseMask, steps: Iterable[tuple[int, float, float]], backend: str = "auto"
) -> None:
    """Applies recorded updates in order; lands on the bits of the run that recorded them.

    Args:
        model: the base model the run started from; its masked weights are written.
        mask: the run's mask.
        steps: (seed, lr, g) of each update: seed in [0, 2**64), learning rate, fp32 projected gradient. NaN for g is an
            update that was not taken (``SparseZO(nonfinite="skip")``) and is left out.
        backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.

    Raises:
        MaskError: if the mask is another model's.
        ValueError: if a learning rate is not finite, a projected gradient is infinite, or fp32 cannot hold a product
            of the two.
    """
    replay_(MaskedWeights(model, mask, backend), steps)


def replay_(weights: MaskedWeights, steps: Iterable[tuple[int, float, float]]) -> None:
    """``replay`` on masked weights that are there already, whose masters tell more than the live weights do.

    Args:
        weights: written.
        steps: as for ``replay``.

    Raises:
        ValueError: if a scalar is not finite.
    """
    seeds, c = [], []
    for seed, lr, g in steps:
        if math.isinf(g) or not math.isfinite(lr):
            raise ValueError(f"lr and projected gradient must be finite, got lr {lr} and g {g}")
        if math.isnan(g):
            continue
        seeds.append(seed)
        c.append(lr * g)
    weights.replay_(seeds, c)


__all__ = ["replay", "replay_"]
