"""The step rules that are compared. Each turns the losses of a step into an update of the masked weights ``w``.

    u   =  mean_j c_j s * z_j                    c_j from the losses at w + eps s * z_j (and w - eps s * z_j, or w)
    v  <-  beta v + (1 - beta) u                 beta = 0: v = u
    w  <-  w - lr v

``z_j`` follows from a seed; ``s`` (all ones, unless a rule scales the elements) from the mask, or from earlier scalars.
So every rule can be replayed from seeds and scalars. That momentum is no more than other coefficients for past seeds:
``v = (1 - beta) sum_i beta^i u_{t-i}``.

References:
    FZOO, arXiv 2506.09034 (one-sided losses, steps divided by their standard deviation). HiSo, arXiv 2506.02370
    (a diagonal learned from aggregated scalars). FeedSign, arXiv 2501.17610 (signs). MeZO, arXiv 2305.17333.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ....fed.terms import Schedule

_MEMORY = 0.95  # decay of the mean square of past scalars


class Unit(StrEnum):
    """What a step's scalars are divided by.

    ``NONE``: nothing. ``LOSSES``: standard deviation of the step's losses, over eps. ``RMS``: root mean square of this
    step's and past scalars. ``SIGN``: their own size. ``CLIP``: nothing, but they are clipped to one unit.
    """

    NONE = "none"
    LOSSES = "losses"
    RMS = "rms"
    SIGN = "sign"
    CLIP = "clip"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A step rule.

    Args:
        name: its name in tables.
        queries: ``q``, number of perturbations of a step.
        one_sided: whether the loss at ``w + eps z`` is compared with that at ``w``, which all queries share, instead of
            that at ``w - eps z``.
        split: whether each query sees its own part of the batch, a q-th of it.
        rademacher: whether ``z`` has the values -1 and 1 instead of normals.
        unit: what scalars are divided by. Divided scalars are multiplied by the same constant for all rules, the root
            mean square of scalars at the base model, so that learning rates are of the same size.
        momentum: ``beta``, in [0, 1).
        curvature: ``nu``, in [0, 1): ``s = (h / mean(h)) ** -0.5`` with ``h <- (1 - nu) h + nu u^2``, at first the
            square of a scalar at the base model; 0: no scaling. (HiSo leaves out the division by the mean, which keeps
            learning rates comparable.)
        score_power: ``p``: ``s`` is proportional to the mask's scores (mean squared gradients) to this power, with mean
            square 1; 0: no scaling.
        schedule: schedule of the learning rate.
        lr_factor: where the search for the learning rate begins, as a multiple of the configured one.
    """

    name: str
    queries: int = 1
    one_sided: bool = False
    split: bool = False
    rademacher: bool = False
    unit: Unit = Unit.NONE
    momentum: float = 0.0
    curvature: float = 0.0
    score_power: float = 0.0
    schedule: Schedule = Schedule.CONSTANT
    lr_factor: float = 1.0

    @property
    def forwards(self) -> int:
        """Forwards of a step, in forwards of a whole batch."""
        if self.split:
            return 2
        return self.queries + 1 if self.one_sided else 2 * self.queries

    def rate(self, lr: float, progress: float) -> float:
        """Learning rate after a share ``progress`` of all forwards, in [0, 1)."""
        if self.schedule is Schedule.LINEAR:
            return lr * (1 - progress)
        if self.schedule is Schedule.COSINE:
            return lr * (1 + math.cos(math.pi * progress)) / 2
        return lr


class Scalars:
    """Turns the scalars of each step into its coefficients ``c_j``, and remembers what later steps need.

    Args:
        method: the rule.
        typical: root mean square of scalars at the base model.
    """

    def __init__(self, method: Method, typical: float) -> None:
        self._unit, self._typical = method.unit, typical
        self._mean_square, self._weight = 0.0, 0.0

    def coefficients(self, scalars: Sequence[float]) -> list[float]:
        """Returns the coefficients of a step's queries.

        Args:
            scalars: projected gradients of the queries.
        """
        if self._unit is Unit.NONE:
            return list(scalars)
        if self._unit is Unit.CLIP:
            return [max(-self._typical, min(self._typical, g)) for g in scalars]
        if self._unit is Unit.SIGN:
            return [math.copysign(self._typical, g) for g in scalars]
        if self._unit is Unit.LOSSES:  # eps is the same in scalars and losses, and cancels
            return self._divided(scalars, statistics.stdev(scalars))
        self._mean_square = _MEMORY * self._mean_square + (1 - _MEMORY) * statistics.fmean(g * g for g in scalars)
        self._weight = _MEMORY * self._weight + (1 - _MEMORY)
        return self._divided(scalars, math.sqrt(self._mean_square / self._weight))

    def _divided(self, scalars: Sequence[float], by: float) -> list[float]:
        return [self._typical * g / by if by else 0.0 for g in scalars]


METHODS = {
    method.name: method
    for method in (
        Method(name="two-point"),
        Method(name="two-point, linear schedule", schedule=Schedule.LINEAR, lr_factor=2.0),
        Method(name="two-point, rms-normalized", unit=Unit.RMS),
        Method(name="two-point, clipped", unit=Unit.CLIP),
        Method(name="two-point, signs", unit=Unit.SIGN),
        Method(name="two-point, q = 4", queries=4, lr_factor=2.0),
        Method(name="one-sided, q = 4", queries=4, one_sided=True, lr_factor=2.0),
        Method(name="FZOO, q = 4", queries=4, one_sided=True, unit=Unit.LOSSES),
        Method(name="FZOO, q = 8", queries=8, one_sided=True, unit=Unit.LOSSES, lr_factor=2.0),
        Method(
            name="FZOO, q = 8, Rademacher", queries=8, one_sided=True, unit=Unit.LOSSES, rademacher=True, lr_factor=2.0
        ),
        Method(name="FZOO, q = 16", queries=16, one_sided=True, unit=Unit.LOSSES, lr_factor=2.0),
        Method(name="FZOO, two-point, q = 4", queries=4, unit=Unit.LOSSES, lr_factor=2.0),
        Method(
            name="FZOO, q = 8, scores ** 1/4",
            queries=8,
            one_sided=True,
            unit=Unit.LOSSES,
            score_power=0.25,
            lr_factor=2.0,
        ),
        Method(
            name="FZOO, q = 8, momentum 0.9", queries=8, one_sided=True, unit=Unit.LOSSES, momentum=0.9, lr_factor=2.0
        ),
        Method(
            name="FZOO, q = 8, linear schedule",
            queries=8,
            one_sided=True,
            unit=Unit.LOSSES,
            schedule=Schedule.LINEAR,
            lr_factor=2.0,
        ),
        Method(name="momentum 0.9", momentum=0.9),
        Method(name="HiSo, nu = 0.1", curvature=0.1),
        Method(name="scores ** -1/4", score_power=-0.25),
        Method(name="scores ** 1/4", score_power=0.25),
        Method(name="split batch, q = 4", queries=4, split=True, lr_factor=2.0),
    )
}

__all__ = ["METHODS", "Method", "Scalars", "Unit"]
