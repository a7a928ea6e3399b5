"""Differences between two arms of an experiment, paired by seed: which of them are more than chance."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .finished import FinishedRun

# Two-sided 95% quantiles of Student's t by degrees of freedom; for more than 10, the larger value of 10 is used.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference over seeds, with its 95% interval by Student's t.

    Args:
        mean: the mean difference.
        half_width: half of the interval's width; NaN for a single seed, which shows nothing.
        seeds: number of seeds.
    """

    mean: float
    half_width: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0: a difference that is unlikely to be chance."""
        return abs(self.mean) > self.half_width


def difference_of(values: Sequence[float]) -> Difference:
    """Returns the mean of differences, one per seed, with its interval. Both are NaN if a run diverged."""
    if not all(math.isfinite(value) for value in values):
        return Difference(mean=math.nan, half_width=math.nan, seeds=len(values))
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Difference(mean=mean, half_width=math.nan, seeds=1)
    quantile = _T95[min(len(values) - 1, len(_T95)) - 1]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Difference(mean=mean, half_width=half, seeds=len(values))


def paired_difference(
    runs: Sequence[FinishedRun], others: Sequence[FinishedRun], value: Callable[[FinishedRun], float]
) -> Difference | None:
    """Compares the runs of two arms that have the same seed, and so the same partition, batches and perturbations.

    Args:
        runs: runs of one arm.
        others: runs of the other arm, which is subtracted.
        value: the value of a run to compare.

    Returns:
        The difference; None if the arms have no seed in common.
    """
    by_seed = {run.config["seed"]: value(run) for run in others}
    values = [value(run) - by_seed[run.config["seed"]] for run in runs if run.config["seed"] in by_seed]
    return difference_of(values) if values else None


def shown(difference: Difference | None) -> str:
    """Returns a difference with its interval for a table, marked with ``*`` if that excludes 0; empty for None."""
    if difference is None:
        return ""
    if math.isnan(difference.mean):
        return "not finite"
    half = "" if math.isnan(difference.half_width) else f" ± {difference.half_width:.3f}"
    return f"{difference.mean:+.3f}{half}{' *' if difference.excludes_zero else ''}"


def after_of(run: FinishedRun) -> float:
    """The main score of a run after training."""
    return run.after


def loss_of(run: FinishedRun) -> float:
    """The validation loss of a run after training."""
    return run.validation_loss


__all__ = ["Difference", "after_of", "difference_of", "loss_of", "paired_difference", "shown"]
