"""``replay``: rebuilds the final weights of a training from its base model and its updates."""

import math
from collections.abc import Iterable

from torch import nn

from .errors import LedgerError
from .mask import SparseMask
from .stream import VERSION
from .updates import Update, UpdateLog
from .weights import MaskedWeights


def replay(
    model: nn.Module,
    mask: SparseMask,
    updates: UpdateLog | Iterable[tuple[int, float, float]],
    backend: str = "auto",
) -> None:
    """Applies recorded updates in order; the result has the bits of the training that recorded them.

    Args:
        model: the base model of the training; its masked weights are written.
        mask: the mask of the training.
        updates: ``SparseZO.log``, or another log. It is checked to belong to these weights. Or the bare (seed, lr, g)
            of each update, which nothing can check: seed in [0, 2**64), learning rate, fp32 projected gradient. A NaN g
            marks a skipped query (``SparseZO(nonfinite="skip")``); its update is left out.
        backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.

    Raises:
        MaskError: if the mask was made for another model.
        LedgerError: if the log was recorded with another mask, from other masked weights (another base model or dtype,
            or the weights at which a resumed training began), in another version of the stream, or ends at other
            weights than recorded. The weights are unchanged.
        ValueError: if a learning rate is not finite, a projected gradient is infinite, or their product is not finite
            in fp32.
    """
    if isinstance(updates, UpdateLog):
        _replay_log(model, mask, updates, backend)
    else:
        replay_(MaskedWeights(model, mask, backend), updates)


def replay_(weights: MaskedWeights, steps: Iterable[tuple[int, float, float]]) -> None:
    """Does ``replay`` on existing masked weights, starting from their masters instead of the live weights.

    The masters are more precise than live weights of low precision.

    Args:
        weights: the masked weights; written.
        steps: bare updates, see ``replay``.

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


def _replay_log(model: nn.Module, mask: SparseMask, log: UpdateLog, backend: str) -> None:
    if log.mask != mask.digest:
        raise LedgerError(f"the updates were recorded with mask {log.mask[:12]}, this mask is {mask.digest[:12]}")
    if log.stream_version != VERSION:
        raise LedgerError(f"the updates are of stream version {log.stream_version}, this is version {VERSION}")
    groups = {name: number for number, names in enumerate(log.groups) for name in names}
    weights = MaskedWeights(model, mask, backend, groups)
    if groups and set(groups) != set(weights.names()):
        raise LedgerError("the parameter groups of the updates are not those of the mask's parameters")
    start = weights.digest()
    if log.start != start:
        raise LedgerError(
            f"the updates were recorded from masked weights {log.start[:12]}, this model's are {start[:12]}; replay on "
            f"the base model in its original dtype, and the updates of a resumed training after those before it"
        )
    masters = weights.masters()
    applied = [update for update in log.updates if not math.isnan(update[2])]
    weights.replay_([seed for seed, _, _ in applied], [_coefficients(update) for update in applied])
    end = weights.digest()
    if log.end not in ("", end):
        weights.set_masters_(masters)
        raise LedgerError(
            f"the updates should end at masked weights {log.end[:12]}, but end at {end[:12]}; some are missing, "
            f"or are not of this training; nothing was changed"
        )


def _coefficients(update: Update) -> tuple[float, ...]:
    """Returns ``lr * g`` of each parameter group."""
    _, lr, g = update
    return tuple(rate * g for rate in (lr if isinstance(lr, tuple) else (lr,)))


__all__ = ["replay", "replay_"]
