"""How the projected gradients of a step are estimated: which losses are taken where, one pass over the weights each.

    two-point             g_j = (f(w + eps * z_j) - f(w - eps * z_j)) / (2 * eps)        2 q forwards
    forward difference    g_j = (f(w + eps * z_j) - f(w)) / eps                          q + 1 forwards

with q perturbations z_j of one step, all around the same w. ``z`` stands for ``z * m``.

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

# Writes the loss at the weights as they are to float32 [1]; the text says where that is, for errors.
Evaluate = Callable[[Tensor, str], None]
# From two losses, float32 [2], and half their distance: mean loss, projected gradient and coefficients (a record).
Record = Callable[[Tensor, float], Tensor]


class Estimator(StrEnum):
    """How a projected gradient is estimated.

    ``TWO_POINT``: central difference; its error is of the order eps squared.
    ``FORWARD_DIFFERENCE``: one evaluation at ``w`` serves all queries of a step; its error is of the order eps.
    """

    TWO_POINT = "two-point"
    FORWARD_DIFFERENCE = "forward-difference"


class NonFinite(StrEnum):
    """What becomes of a query whose losses or coefficient are NaN or infinite.

    ``RAISE``: it ends the run with ``NonFiniteLossError``.
    ``SKIP``: it is not taken, its scalar is NaN, and the run goes on.
    """

    RAISE = "raise"
    SKIP = "skip"


class PendingUpdates:
    """Masked weights on their way through some steps; an update waits for the perturbation that comes next.

    Args:
        weights: written.

    Attributes:
        pending: seed int64 [1] and coefficients float32 [groups] of updates that are still to be applied, in order.
    """

    def __init__(self, weights: MaskedWeights) -> None:
        self.weights = weights
        self.pending: list[tuple[Tensor, Tensor]] = []

    def perturb_(self, seed: Tensor, scale: float) -> None:
        """``w <- cast(master + scale * z)`` after all updates, the last of these in the same pass."""
        at = self.weights.values.numbers([scale], torch.float32)
        while len(self.pending) > 1:
            self.weights.update_(*self.pending[0])
            del self.pending[0]
        if self.pending:
            self.weights.update_perturb_(*self.pending[0], seed, at)
            self.pending.clear()
        else:
            self.weights.perturb_(seed, at)

    def flush_(self) -> None:
        """``w <- cast(master)`` after all updates."""
        if not self.pending:
            self.weights.restore_()
        while self.pending:
            self.weights.update_(*self.pending[0])
            del self.pending[0]


def two_point(
    walk: PendingUpdates, seeds: Sequence[Tensor], eps: float, evaluate: Evaluate, record: Record
) -> tuple[Tensor, list[Tensor]]:
    """The queries of a step, at +eps and then at -eps each.

    Args:
        walk: left perturbed.
        seeds: int64 [1] of each query.
        eps: perturbation scale.
        evaluate: takes a loss.
        record: makes a record of two.

    Returns:
        Mean of all the losses, float32 scalar; a record a query.
    """
    pairs, records = [], []
    for seed in seeds:
        pair = torch.empty(2, dtype=torch.float32, device=walk.weights.values.device)
        walk.perturb_(seed, eps)
        evaluate(pair[:1], "+eps")
        walk.perturb_(seed, -eps)
        evaluate(pair[1:], "-eps")
        pairs.append(pair)
        records.append(record(pair, eps))
    return records[0][0] if len(pairs) == 1 else torch.cat(pairs).double().mean().float(), records


def forward_difference(
    walk: PendingUpdates, seeds: Sequence[Tensor], eps: float, evaluate: Evaluate, record: Record
) -> tuple[Tensor, list[Tensor]]:
    """The loss at ``w``, then each query at +eps; arguments as for ``two_point``.

    Returns:
        The loss at ``w``, float32 scalar; a record a query.
    """
    at_w = torch.empty(1, dtype=torch.float32, device=walk.weights.values.device)
    walk.flush_()
    evaluate(at_w, "w")
    records = []
    for seed in seeds:
        pair = torch.cat((at_w, at_w))
        walk.perturb_(seed, eps)
        evaluate(pair[:1], "+eps")
        records.append(record(pair, eps / 2))  # 2 * (eps / 2) is eps, exactly
    return at_w[0], records


def evaluate_closure(
    closure: Callable[[], Tensor | float], out: Tensor, where: str, *, check_immediately: bool
) -> None:
    """Writes the closure's loss to ``out``, float32 [1]: a copy, since the closure may use its tensor again.

    Args:
        closure: called in inference mode.
        out: written.
        where: in the weights, for errors.
        check_immediately: whether to look at the loss, which on a GPU would wait for it.

    Raises:
        NonFiniteLossError: if it is looked at and is NaN or infinite.
        ValueError: if it is not one number.
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
    """Coefficients of a query, float32 [groups]: all NaN if one is not finite, so that no group takes it alone."""
    return c if c.numel() == 1 else torch.where(c.isfinite().all(), c, torch.nan)


def gradients_or_nan(records: Tensor) -> list[float]:
    """The projected gradient of each record, float32 [n, 2 + groups]; NaN where anything in it is not finite."""
    gradients: list[float] = torch.where(records.isfinite().all(1), records[:, 1], torch.nan).tolist()
    return gradients


def check_all_finite(records: Tensor, first: int, queries: int = 1) -> None:
    """Raises ``NonFiniteLossError`` for the first record that is not finite.

    Args:
        records: float32 [n, 2 + groups], one a query.
        first: number of the first of them, counting all queries.
        queries: per step.
    """
    bad = (~records.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        step, query = divmod(first + bad[0], queries)
        which = f"step {step}" if queries == 1 else f"query {query} of step {step}"
        loss, g, *c = records[bad[0]].tolist()
        raise NonFiniteLossError(
            f"{which} was not taken: mean loss {loss}, projected gradient {g}, lr * g {c} (try a smaller lr or eps)"
        )


def check_eps(eps: float) -> None:
    """Raises ``ValueError`` unless the perturbation scale is finite and positive."""
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be finite and positive, got {eps}")


def check_queries(queries: int) -> int:
    """The number of queries a step; raises ``ValueError`` out of range."""
    if not isinstance(queries, int) or not 1 <= queries < 1 << 32:
        raise ValueError(f"queries must be an integer in [1, 2**32), got {queries!r}")
    return queries


def check_estimator(estimator: str) -> Estimator:
    """The estimator of that name; raises ``ValueError`` naming the known ones."""
    if estimator not in list(Estimator):
        raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(Estimator)}")
    return Estimator(estimator)


def check_nonfinite(nonfinite: str) -> NonFinite:
    """The choice of that name; raises ``ValueError`` naming the known ones."""
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
