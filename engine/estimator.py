"""Estimators of a step's projected gradients: at which weights the losses are evaluated. One pass per evaluation.

    two-point             g_j = (f(w + eps * z_j) - f(w - eps * z_j)) / (2 * eps)        2 q forwards
    forward difference    g_j = (f(w + eps * z_j) - f(w)) / eps                          q + 1 forwards
    normalized difference g_j = (f(w + eps * z_j) - f(w)) / s                            q + 1 forwards
                          s: standard deviation of the q losses f(w + eps * z_j)

A step has q perturbations z_j, all around the same w. ``z`` stands for ``z * m``.

References:
    Two-point: Spall 1992 (SPSA); MeZO, arXiv 2305.17333, algorithm 1 and appendix on n-SPSA.
    Forward difference: DeComFL, arXiv 2405.15861, algorithms 1 to 3, with P perturbations.
    Normalized difference: FZOO, arXiv 2506.09034, with normals instead of signs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Protocol, SupportsFloat

import torch
from torch import Tensor

from ..triton_kernels import reference
from .caller_warnings import warn_caller
from .errors import NonFiniteLossError
from .two_points import BothPoints
from .weights import round_fp32

# Writes the loss at the current weights to a float32 [1] tensor. The text names the point ("+eps", "w") in errors.
Evaluate = Callable[[Tensor, str], None]
# Makes a query's record, float32 [2 + groups]: mean loss, projected gradient, then one coefficient per group.
# Arguments: the two losses, float32 [2], and half of what their difference is divided by: half the distance between
# their points, in units of the scale of ``perturb_``; or a number on the device, float64 [1].
Record = Callable[[Tensor, float | Tensor], Tensor]


class Estimator(StrEnum):
    """Estimator of the projected gradient.

    ``TWO_POINT``: central difference. Its error is of the order eps squared.
    ``FORWARD_DIFFERENCE``: all queries of a step share one evaluation at ``w``. Its error is of the order eps.
    ``NORMALIZED_DIFFERENCE``: forward differences, divided by the standard deviation of the step's losses instead of
    eps: the size of a step depends on neither the scale of the loss nor that of its gradient. At least two queries.
    """

    TWO_POINT = "two-point"
    FORWARD_DIFFERENCE = "forward-difference"
    NORMALIZED_DIFFERENCE = "normalized-difference"

    @property
    def is_one_sided(self) -> bool:
        """Whether all queries of a step are compared with one loss at ``w``."""
        return self is not Estimator.TWO_POINT

    @property
    def least_queries(self) -> int:
        """Smallest number of queries of a step."""
        return 2 if self is Estimator.NORMALIZED_DIFFERENCE else 1


class NonFinite(StrEnum):
    """Handling of a query whose losses or coefficient are NaN or infinite.

    ``RAISE``: raise ``NonFiniteLossError``.
    ``SKIP``: skip the query, record NaN as its scalar, and continue.
    """

    RAISE = "raise"
    SKIP = "skip"


class Weights(Protocol):
    """The masked weights as an estimator uses them; see ``Journal``."""

    @property
    def device(self) -> torch.device:
        """Device of the losses."""

    def perturb_(self, seed: Tensor, scale: float) -> None:
        """Sets ``w <- cast(master + scale * z)``, after all updates of earlier steps."""

    def flush_(self) -> None:
        """Sets ``w <- cast(master)``, after all updates of earlier steps."""


def two_point(
    weights: Weights, seeds: Sequence[Tensor], eps: float, evaluate: Evaluate, record: Record
) -> tuple[Tensor, list[Tensor]]:
    """Evaluates each query of a step at +eps and then at -eps.

    Args:
        weights: the masked weights; they are left perturbed.
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
        pair = torch.empty(2, dtype=torch.float32, device=weights.device)
        weights.perturb_(seed, eps)
        evaluate(pair[:1], "+eps")
        weights.perturb_(seed, -eps)
        evaluate(pair[1:], "-eps")
        pairs.append(pair)
        records.append(record(pair, eps))
    return _mean(pairs, records), records


def two_point_together(
    weights: Weights, seeds: Sequence[Tensor], eps: float, evaluate: Evaluate, record: Record, both: BothPoints
) -> tuple[Tensor, list[Tensor]]:
    """Evaluates each query of a step at both points, in one pass through the model where that pays.

    Args:
        weights: see ``two_point``.
        seeds: see ``two_point``.
        eps: see ``two_point``.
        evaluate: see ``two_point``.
        record: see ``two_point``.
        both: computes both points.

    Returns:
        See ``two_point``.
    """
    pairs, records = [], []
    try:
        for seed in seeds:
            pair = torch.empty(2, dtype=torch.float32, device=weights.device)
            weights.perturb_(seed, -eps)
            both.keep_second()
            weights.perturb_(seed, eps)
            with both.first():
                evaluate(pair[:1], "+eps")
            with both.second():
                evaluate(pair[1:], "-eps")
            pairs.append(pair)
            records.append(record(pair, eps))
    finally:
        both.forget()
    return _mean(pairs, records), records


def _mean(pairs: Sequence[Tensor], records: Sequence[Tensor]) -> Tensor:
    """Mean of the losses of a step, float32 scalar."""
    return records[0][0] if len(pairs) == 1 else torch.cat(list(pairs)).double().mean().float()


def forward_difference(
    weights: Weights, seeds: Sequence[Tensor], eps: float, evaluate: Evaluate, record: Record
) -> tuple[Tensor, list[Tensor]]:
    """Evaluates the loss at ``w``, then each query of a step at +eps. For the arguments see ``two_point``.

    Returns:
        loss: the loss at ``w``, float32 scalar.
        records: one record per query.
    """
    pairs = _one_sided_losses(weights, seeds, eps, evaluate)
    return pairs[0][1], [record(pair, eps / 2) for pair in pairs]  # 2 * (eps / 2) is eps, exactly


def normalized_difference(
    weights: Weights, seeds: Sequence[Tensor], eps: float, evaluate: Evaluate, record: Record
) -> tuple[Tensor, list[Tensor]]:
    """Evaluates the loss at ``w``, then each query of a step at +eps. For the arguments see ``two_point``.

    If one of the losses is not finite, none of the scalars is.

    Returns:
        loss: the loss at ``w``, float32 scalar.
        records: one record per query.
    """
    pairs = _one_sided_losses(weights, seeds, eps, evaluate)
    half = reference.half_deviation(torch.cat([pair[:1] for pair in pairs]))
    return pairs[0][1], [record(pair, half) for pair in pairs]


def _one_sided_losses(weights: Weights, seeds: Sequence[Tensor], eps: float, evaluate: Evaluate) -> list[Tensor]:
    """Pairs of losses at +eps and at ``w``, float32 [2] each, one for each query. The weights are left perturbed."""
    at_w = torch.empty(1, dtype=torch.float32, device=weights.device)
    weights.flush_()
    evaluate(at_w, "w")
    pairs = []
    for seed in seeds:
        pair = torch.cat((at_w, at_w))
        weights.perturb_(seed, eps)
        evaluate(pair[:1], "+eps")
        pairs.append(pair)
    return pairs


def evaluate_closure(
    closure: Callable[[], Tensor | float],
    out: Tensor,
    where: str,
    *,
    check_immediately: bool,
    on_low_precision: Callable[[torch.dtype], None] | None = None,
) -> None:
    """Copies the closure's loss to ``out``. It is copied because the closure may reuse its tensor.

    Args:
        closure: returns the loss, one number; called in inference mode.
        out: float32 [1], receives the loss.
        where: name of the point in weight space ("+eps", "-eps", "w"), for errors.
        check_immediately: whether to check the loss now. On a GPU this makes the host wait.
        on_low_precision: called with the loss's dtype if that is narrower than float32.

    Raises:
        NonFiniteLossError: if the loss is checked and is NaN or infinite.
        TypeError: if the closure returns something else than a number or a tensor.
        ValueError: if the closure does not return exactly one real number.
    """
    try:
        with torch.inference_mode():
            value = closure()
    except RuntimeError as error:
        if "does not require grad" in str(error):
            error.add_note(
                "A zeroth-order step calls its closure in inference mode: it returns the loss, without backward()."
            )
        raise
    loss = _one_number(value)
    if isinstance(loss, Tensor):
        if loss.is_floating_point() and loss.dtype.itemsize < 4 and on_low_precision is not None:
            on_low_precision(loss.dtype)
        out.copy_(loss.detach().reshape(1))
    else:
        out.fill_(round_fp32(loss))
    if check_immediately and not math.isfinite(out.item()):
        raise NonFiniteLossError(
            f"the loss at {where} is {out.item()}; the weights are restored (try a smaller lr or eps)"
        )


def _one_number(value: object) -> Tensor | float:
    """Returns a closure's result if it is one real number; else raises ``TypeError`` or ``ValueError``."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"the closure must return one real loss, got {value.dtype}")
        if value.numel() != 1:
            raise ValueError(
                f"the closure must return one loss, got a tensor of shape {list(value.shape)}; take its mean"
            )
        return value
    if value is None:
        raise TypeError("the closure returned None; end it with `return loss`")
    if isinstance(value, str | bytes | Mapping | Sequence) or not isinstance(value, SupportsFloat):
        raise TypeError(
            f"the closure must return the loss alone, a scalar, got {type(value).__name__}; return its loss, such as "
            f"`output.loss`"
        )
    return float(value)


def warn_low_precision(dtype: torch.dtype) -> None:
    """Warns that a loss is too coarse for differences of losses.

    Args:
        dtype: dtype of the loss, bfloat16 or float16.
    """
    warn_caller(
        f"the loss is {dtype}: near 1 it is a multiple of {torch.finfo(dtype).eps}, which rounds away most of the "
        f"difference of a step's losses; compute the loss in float32, from `logits.float()`"
    )


def nan_unless_all_finite(c: Tensor) -> Tensor:
    """Returns a query's coefficients, float32 [groups], all NaN if one is not finite.

    So a query is applied in all parameter groups or in none.
    """
    return c if c.numel() == 1 else torch.where(c.isfinite().all(), c, torch.nan)


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
    if not 2.0**-149 <= eps < 2.0**128:
        raise ValueError(f"eps must be finite and positive in fp32, got {eps}")


def check_queries(queries: int) -> int:
    """Returns the number of queries per step; raises ``ValueError`` if it is out of range."""
    if not isinstance(queries, int) or not 1 <= queries < 1 << 32:
        raise ValueError(f"queries must be an integer in [1, 2**32), got {queries!r}")
    return queries


def check_enough_queries(queries: int, estimator: Estimator) -> None:
    """Raises ``ValueError`` if a step has fewer queries than its estimator needs."""
    if queries < estimator.least_queries:
        raise ValueError(
            f"the estimator {estimator} divides by the deviation of a step's losses, and needs at least "
            f"{estimator.least_queries} queries, got {queries}"
        )


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


ESTIMATES = {
    Estimator.TWO_POINT: two_point,
    Estimator.FORWARD_DIFFERENCE: forward_difference,
    Estimator.NORMALIZED_DIFFERENCE: normalized_difference,
}

__all__ = [
    "ESTIMATES",
    "Estimator",
    "NonFinite",
    "Weights",
    "check_all_finite",
    "check_enough_queries",
    "check_eps",
    "check_estimator",
    "check_nonfinite",
    "check_queries",
    "evaluate_closure",
    "forward_difference",
    "nan_unless_all_finite",
    "normalized_difference",
    "two_point",
    "two_point_together",
    "warn_low_precision",
]
