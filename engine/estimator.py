"""Estimators of a step's projected gradients: at which weights the losses are evaluated. One pass per evaluation.

    two-point             g_j = (f(w + eps * z_j) - f(w - eps * z_j)) / (2 * eps)        2 q forwards
    forward difference    g_j = (f(w + eps * z_j) - f(w)) / eps                          q + 1 forwards

A step has q perturbations z_j, all around the same w. ``z`` stands for ``z * m``.

References:
    Two-point: Spall 1992 (SPSA); MeZO, arXiv 2305.17333, algorithm 1 and appendix on n-SPSA.
    Forward difference: DeComFL, arXiv 2405.15861, algorithms 1 to 3, with P perturbations.
"""

import math
from collections.abc import Callable, Sequence
from enum import StrEnum

import torch
from torch import Tensor

from .errors import NonFiniteLossError
from .weights import MaskedWeights, round_fp32

# Writes the loss at the current weights to a float32 [1] tensor. The text names the point ("+eps", "w") in errors.
Evaluate = Callable[[Tensor, str], None]
# Makes a query's record, float32 [2 + groups]: mean loss, projected gradient, then one coefficient per group.
# Arguments: the two losses, float32 [2], and half the distance between their points.
Record = Callable[[Tensor, float], Tensor]


class Estimator(StrEnum):
    """Estimator of the projected gradient.

    ``TWO_POINT``: central difference. Its error is of the order eps squared.
    ``FORWARD_DIFFERENCE``: all queries of a step share one evaluation at ``w``. Its error is of the order eps.
    """

    TWO_POINT = "two-point"
    FORWARD_DIFFERENCE = "forward-difference"


class NonFinite(StrEnum):
    """Handling of a query whose losses or coefficient are NaN or infinite.

    ``RAISE``: raise ``NonFiniteLossError``.
    ``SKIP``: skip the query, record NaN as its scalar, and continue.
    """

    RAISE = "raise"
    SKIP = "skip"


class PendingUpdates:
    """Delays each update until the next perturbation, so that both share one pass over the masked weights.

    Args:
        weights: the masked weights to perturb and update.

    Attributes:
        pending: updates that are not applied yet, in order: (seed int64 [1], coefficients float32 [groups]).
    """

    def __init__(self, weights: MaskedWeights) -> None:
        self.weights = weights
        self.pending: list[tuple[Tensor, Tensor]] = []

    def perturb_(self, seed: Tensor, scale: float) -> None:
        """Applies all pending updates, then ``w <- cast(master + scale * z)``; the last update shares its pass.

        Args:
            seed: int64 [1], seed of ``z``.
            scale: scale of the perturbation, ``+eps`` or ``-eps``.
        """
        scale_on_device = self.weights.values.numbers([scale], torch.float32)
        while len(self.pending) > 1:
            self.weights.update_(*self.pending[0])
            del self.pending[0]
        if self.pending:
            self.weights.update_perturb_(*self.pending[0], seed, scale_on_device)
            self.pending.clear()
        else:
            self.weights.perturb_(seed, scale_on_device)

    def flush_(self) -> None:
        """Applies all pending updates and sets ``w <- cast(master)``."""
        if not self.pending:
            self.weights.restore_()
        while self.pending:
            self.weights.update_(*self.pending[0])
            del self.pending[0]


def two_point(
    updates: PendingUpdates, seeds: Sequence[Tensor], eps: float, evaluate: Evaluate, record: Record
) -> tuple[Tensor, list[Tensor]]:
    """Evaluates each query of a step at +eps and then at -eps.

    Args:
        updates: the masked weights with their pending updates; the weights are left perturbed.
        seeds: seed of each query, int64 [1].
        eps: perturbation scale.
        evaluate: writes the loss at the current weights.
        record: makes a query's record from its two losses.

    Returns:
        loss: mean of all losses, float32 scalar.
        records: one record per query.
    """
    pairs, records = [], []
    for seed in seeds:
        pair = torch.empty(2, dtype=torch.float32, device=updates.weights.values.device)
        updates.perturb_(seed, eps)
        evaluate(pair[:1], "+eps")
        updates.perturb_(seed, -eps)
        evaluate(pair[1:], "-eps")
        pairs.append(pair)
        records.append(record(pair, eps))
    return records[0][0] if len(pairs) == 1 else torch.cat(pairs).double().mean().float(), records


def forward_difference(
    updates: PendingUpdates, seeds: Sequence[Tensor], eps: float, evaluate: Evaluate, record: Record
) -> tuple[Tensor, list[Tensor]]:
    """Evaluates the loss at ``w``, then each query of a step at +eps. For the arguments see ``two_point``.

    Returns:
        loss: the loss at ``w``, float32 scalar.
        records: one record per query.
    """
    at_w = torch.empty(1, dtype=torch.float32, device=updates.weights.values.device)
    updates.flush_()
    evaluate(at_w, "w")
    records = []
    for seed in seeds:
        pair = torch.cat((at_w, at_w))
        updates.perturb_(seed, eps)
        evaluate(pair[:1], "+eps")
        records.append(record(pair, eps / 2))  # 2 * (eps / 2) is eps, exactly
    return at_w[0], records


def evaluate_closure(
    closure: Callable[[], Tensor | float], out: Tensor, where: str, *, check_immediately: bool
) -> None:
    """Copies the closure's loss to ``out``. It is copied because the closure may reuse its tensor.

    Args:
        closure: returns the loss, one number; called in inference mode.
        out: float32 [1], receives the loss.
        where: name of the point in weight space ("+eps", "-eps", "w"), for errors.
        check_immediately: whether to check the loss now. On a GPU this makes the host wait.

    Raises:
        NonFiniteLossError: if the loss is checked and is NaN or infinite.
        ValueError: if the closure does not return exactly one number.
    """
    with torch.inference_mode():
        value = closure()
    if not isinstance(value, Tensor):
        out.fill_(round_fp32(value))
    elif value.numel() == 1:
        out.copy_(value.detach().reshape(1))
    else:
        raise ValueError(f"the closure must return one loss, got a tensor of shape {list(value.shape)}")
    if check_immediately and not math.isfinite(out.item()):
        raise NonFiniteLossError(
            f"the loss at {where} is {out.item()}; the weights are restored (try a smaller lr or eps)"
        )


def nan_unless_all_finite(c: Tensor) -> Tensor:
    """Returns a query's coefficients, float32 [groups], all NaN if one is not finite.

    So a query is applied in all parameter groups or in none.
    """
    return c if c.numel() == 1 else torch.where(c.isfinite().all(), c, torch.nan)


def gradients_or_nan(records: Tensor) -> list[float]:
    """Returns the projected gradient of each record, NaN where any value of the record is not finite.

    Args:
        records: float32 [n, 2 + groups], one record per query.
    """
    gradients: list[float] = torch.where(records.isfinite().all(1), records[:, 1], torch.nan).tolist()
    return gradients


def check_all_finite(records: Tensor, first: int, queries: int = 1) -> None:
    """Raises ``NonFiniteLossError`` for the first record that is not finite.

    Args:
        records: float32 [n, 2 + groups], one record per query.
        first: number of the first record's query, counted over all steps from 0.
        queries: number of queries per step.
    """
    bad = (~records.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        step, query = divmod(first + bad[0], queries)
        which = f"step {step}" if queries == 1 else f"query {query} of step {step}"
        loss, g, *c = records[bad[0]].tolist()
        raise NonFiniteLossError(
            f"{which} was not applied: mean loss {loss}, projected gradient {g}, lr * g {c} (try a smaller lr or eps)"
        )


def check_eps(eps: float) -> None:
    """Raises ``ValueError`` unless the perturbation scale is finite and positive."""
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be finite and positive, got {eps}")


def check_queries(queries: int) -> int:
    """Returns the number of queries per step; raises ``ValueError`` if it is out of range."""
    if not isinstance(queries, int) or not 1 <= queries < 1 << 32:
        raise ValueError(f"queries must be an integer in [1, 2**32), got {queries!r}")
    return queries


def check_estimator(estimator: str) -> Estimator:
    """Returns the estimator with this name; raises ``ValueError`` listing the names if there is none."""
    if estimator not in list(Estimator):
        raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(Estimator)}")
    return Estimator(estimator)


def check_nonfinite(nonfinite: str) -> NonFinite:
    """Returns the ``NonFinite`` member with this name; raises ``ValueError`` listing the names if there is none."""
    if nonfinite not in list(NonFinite):
        raise ValueError(f"unknown choice nonfinite={nonfinite!r}; known: {', '.join(NonFinite)}")
    return NonFinite(nonfinite)


ESTIMATES = {Estimator.TWO_POINT: two_point, Estimator.FORWARD_DIFFERENCE: forward_difference}

__all__ = [
    "ESTIMATES",
    "Estimator",
    "NonFinite",
    "PendingUpdates",
    "check_all_finite",
    "check_eps",
    "check_estimator",
    "check_nonfinite",
    "check_queries",
    "evaluate_closure",
    "forward_difference",
    "gradients_or_nan",
    "nan_unless_all_finite",
    "two_point",
]
