"""``run_trial``: one rule with one learning rate and one seed; loss and score on held-out examples against forwards."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ....engine.errors import ConfigError
from .methods import Method, Scalars
from .problem import Problem

_PROBES = 16  # steps of ``typical_scalar``


@dataclass(frozen=True, kw_only=True)
class Point:
    """An evaluation on the held-out examples.

    Args:
        forwards: forwards so far, in forwards of a whole batch.
        loss: validation loss; infinite if the trial has diverged.
        score: the score that the task is judged by; infinite if the trial has diverged.
    """

    forwards: int
    loss: float
    score: float


def run_trial(
    problem: Problem, method: Method, lr: float, typical: float, forwards: int, points: int
) -> list[dict[str, Any]]:
    """Takes steps until a number of forwards is spent.

    Args:
        problem: model, mask and examples; perturbations and batches follow from its seed.
        method: the rule.
        lr: learning rate.
        typical: see ``Scalars``.
        forwards: number of forwards.
        points: number of evaluations, at equal distances, the last one at the end.

    Returns:
        The evaluations as objects for JSON; a loss that is not finite is null, and ends the trial.

    Raises:
        ConfigError: if there are fewer steps than evaluations.
    """
    steps = forwards // method.forwards
    if steps < points:
        raise ConfigError(
            f"{method.name} takes {steps} steps of {method.forwards} forwards in {forwards} forwards, fewer than the "
            f"{points} that are evaluated; use more rounds or local_steps"
        )
    due = {steps * (i + 1) // points for i in range(points)}
    rule, batches, curve = _Rule(problem, method, typical), problem.batches(), []
    for step in range(steps):
        finite = rule.step(step, batches.next_indices(), method.rate(lr, step / steps))
        if not finite or step + 1 in due:
            result = problem.evaluate(rule.w) if finite else None
            loss, score = (result.loss, result.main[1]) if result else (math.inf, math.inf)
            curve.append(asdict(Point(forwards=(step + 1) * method.forwards, loss=loss, score=score)))
        if not finite:
            break
    return [{key: value if math.isfinite(value) else None for key, value in point.items()} for point in curve]


def typical_scalar(problem: Problem) -> float:
    """Root mean square of the two-point scalars at the base model, over a few batches and perturbations."""
    rule, batches = _Rule(problem, Method(name="probe"), 1.0), problem.batches()
    scalars = [rule.scalars(step, batches.next_indices())[1][0] for step in range(_PROBES)]
    return math.sqrt(sum(g * g for g in scalars) / _PROBES)


class _Rule:
    """State of a trial: the masked weights ``w``, float32 [k], and what its rule remembers."""

    def __init__(self, problem: Problem, method: Method, typical: float) -> None:
        self.w = problem.start.clone()
        self._problem, self._method, self._eps = problem, method, problem.eps
        self._scalars = Scalars(method, typical)
        self._scale = problem.scale_by_scores(method.score_power) if method.score_power else None
        self._curvature = torch.full_like(self.w, typical * typical)
        self._velocity = torch.zeros_like(self.w)

    def step(self, step: int, indices: Sequence[int], lr: float) -> bool:
        """Takes a step on a batch; returns whether losses and weights are finite. If not, ``w`` stays."""
        method = self._method
        directions, scalars = self.scalars(step, indices)
        if not all(map(math.isfinite, scalars)):
            return False
        update = torch.zeros_like(self.w)
        for direction, c in zip(directions, self._scalars.coefficients(scalars), strict=True):
            update.add_(direction, alpha=c / method.queries)
        if method.curvature and bool(update.any()):
            self._curvature.lerp_(update.square(), method.curvature)
            self._scale = (self._curvature / self._curvature.mean()).rsqrt()
        self._velocity.mul_(method.momentum).add_(update, alpha=1 - method.momentum)
        moved = self.w - lr * self._velocity
        if not bool(moved.isfinite().all()):
            return False
        self.w = moved
        return True

    def scalars(self, step: int, indices: Sequence[int]) -> tuple[list[Tensor], list[float]]:
        """Evaluates the losses of a step.

        Returns:
            Direction ``s * z`` of each query, float32 [k], and projected gradient of each query.
        """
        method, queries = self._method, self._method.queries
        at_w = self._problem.loss(self.w, indices) if method.one_sided else math.nan
        directions, scalars = [], []
        for query in range(queries):
            seen = indices[query::queries] if method.split else indices
            direction = self._direction(step, query)
            plus = self._problem.loss(self.w + self._eps * direction, seen)
            if method.one_sided:
                scalars.append((plus - at_w) / self._eps)
            else:
                minus = self._problem.loss(self.w - self._eps * direction, seen)
                scalars.append((plus - minus) / (2 * self._eps))
            directions.append(direction)
        return directions, scalars

    def _direction(self, step: int, query: int) -> Tensor:
        z = self._problem.normal(step, query)
        if self._method.rademacher:
            z = torch.where(z < 0, -1.0, 1.0)
        return z if self._scale is None else z * self._scale


__all__ = ["Point", "run_trial", "typical_scalar"]
