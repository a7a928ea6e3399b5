"""``replay``: rebuilds the final weights of a run from its base model and its scalars."""

import math
from collections.abc import Iterable

from torch import nn

from .mask import SparseMask
from .weights import MaskedWeights


def replay(
    model: nn.Module, mask: SparseMask, steps: Iterable[tuple[int, float, float]], backend: str = "auto"
) -> None:
    """Applies recorded updates in order; the result has the bits of the run that recorded them.

    Args:
        model: the base model of the run; its masked weights are written.
        mask: the run's mask.
        steps: (seed, lr, g) of each update: seed in [0, 2**64), learning rate, fp32 projected gradient. A NaN g marks a
            skipped query (``SparseZO(nonfinite="skip")``); its update is left out.
        backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.

    Raises:
        MaskError: if the mask was made for another model.
        ValueError: if a learning rate is not finite, a projected gradient is infinite, or their product is not finite
            in fp32.
    """
    replay_(MaskedWeights(model, mask, backend), steps)


def replay_(weights: MaskedWeights, steps: Iterable[tuple[int, float, float]]) -> None:
    """Does ``replay`` on existing masked weights, starting from their masters instead of the live weights.

    The masters are more precise than live weights of low precision.

    Args:
        weights: the masked weights; written.
        steps: recorded updates, see ``replay``.

    Raises:
        ValueError: see ``replay``.
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
