"""From the clients' answers to the round's: in float64, rounded to fp32 once, whatever order they arrived in.

    mean           g^t = sum_i p_i g_i^t, in client-id order; a client that did not take a step contributes 0 to it
    median         of the clients that took the step, each counting the same; of an even number, the two middle's mean
    trimmed-mean   likewise their mean without the floor(trim n) smallest and largest of the n

A scalar is cut to [-clip, clip] before any of them. A step that nobody took has 0.

The mean goes where a single client that shouts wants it, and believes what each says of its number of examples. The
median stays among the honest scalars while fewer than half are hostile, the trimmed mean while floor(trim n) are at
most: where fewer than 1 / trim clients took a step, it is the plain mean and holds off nobody. Both ignore ``p_i``, for
a claimed number of examples is one more thing to lie about.

References:
    Meerkat, arXiv 2506.03337, section 3 (mean); Yin et al., arXiv 1803.01498 (median, trimmed mean).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import numpy as np

from ..errors import ConfigError
from ..weights import round_fp32


class Weighting(StrEnum):
    """How much each client counts: equally, or by its number of examples."""

    UNIFORM = "uniform"
    EXAMPLES = "examples"


class Rule(StrEnum):
    """What is made of the scalars of a step."""

    MEAN = "mean"
    MEDIAN = "median"
    TRIMMED_MEAN = "trimmed-mean"


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """How a round is made of the clients' answers.

    Args:
        rule: for scalars.
        weighting: how ``p_i`` are made, for the mean, and for weights where clients train by backpropagation.
        trim: share that a trimmed mean cuts from each end, in (0, 0.5).
        clip: largest size of a scalar, larger ones are cut to it; 0 cuts none.

    Raises:
        ConfigError: if a number is out of range.
    """

    rule: Rule = Rule.MEAN
    weighting: Weighting = Weighting.EXAMPLES
    trim: float = 0.2
    clip: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.trim < 0.5:
            raise ConfigError(f"trim must be in (0, 0.5), got {self.trim}")
        if not 0 <= self.clip < math.inf:
            raise ConfigError(f"clip must be finite and not negative (0: none), got {self.clip}")

    def cut(self, clients: int) -> int:
        """How many of the scalars of some clients a trimmed mean cuts from each end."""
        return math.floor(Fraction(str(self.trim)) * clients)  # of the decimal that was given: 0.29 of 100 is 29


def client_weights(examples: Mapping[int, int], weighting: Weighting) -> dict[int, float]:
    """``p_i`` of the clients that answered, in id order; they sum to 1.

    Args:
        examples: number of examples of each client, positive.
        weighting: the rule.
    """
    raw = {i: float(examples[i]) if weighting is Weighting.EXAMPLES else 1.0 for i in sorted(examples)}
    total = sum(raw.values())
    return {i: value / total for i, value in raw.items()}


def aggregate(
    scalars: Mapping[int, Sequence[float]], weights: Mapping[int, float], count: int, how: Aggregation
) -> list[float]:
    """The round's ``count`` scalars, fp32.

    Args:
        scalars: of each client, at most ``count``, NaN where it did not take a step.
        weights: ``p_i`` of each client.
        count: one a step and query, ``T q``.
        how: the rule.
    """
    taken: list[list[tuple[float, float]]] = [[] for _ in range(count)]
    for i in sorted(scalars):
        for t, g in enumerate(scalars[i]):
            if not math.isnan(g):
                taken[t].append((weights[i], max(-how.clip, min(how.clip, g)) if how.clip else g))
    return [round_fp32(_combined(each, how)) for each in taken]


def _combined(taken: Sequence[tuple[float, float]], how: Aggregation) -> float:
    """One step's aggregate of (p_i, g_i) in client-id order."""
    if not taken:
        return 0.0
    if how.rule is Rule.MEAN:
        total = 0.0
        for p, g in taken:  # not sum(), which adds up otherwise from Python 3.12 on
            total += p * g
        return total
    if how.rule is Rule.MEDIAN:
        return float(statistics.median(g for _, g in taken))
    cut = how.cut(len(taken))
    kept = sorted(g for _, g in taken)[cut : len(taken) - cut]
    return math.fsum(kept) / len(kept)


def mean_masters(masters: Mapping[int, np.ndarray | None], weights: Mapping[int, float]) -> np.ndarray:
    """The round's weights where clients train by backpropagation: float32 [k].

    Args:
        masters: of each client, float32 [k].
        weights: ``p_i`` of each client.
    """
    total: np.ndarray | float = 0.0
    for i in sorted(weights):
        own = masters[i]
        assert own is not None
        total = total + weights[i] * own.astype(np.float64)
    return np.asarray(total, dtype=np.float32)


__all__ = ["Aggregation", "Rule", "Weighting", "aggregate", "client_weights", "mean_masters"]
