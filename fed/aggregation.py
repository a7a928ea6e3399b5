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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import numpy as np

from ..engine.errors import ConfigError
from ..engine.weights import round_fp32
from .scalars import ClientScalars


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
    ids = sorted(examples)
    raw = [examples[i] if weighting is Weighting.EXAMPLES else 1 for i in ids]
    total = sum(raw)
    return {i: count / total for i, count in zip(ids, raw, strict=True)}


def in_order(terms: np.ndarray) -> np.ndarray:
    """The sum over the first axis, term by term as a loop from 0.0 on: NumPy's own adds up in pairs.

    Args:
        terms: float64 [n, ...].
    """
    if not len(terms):
        return np.zeros(terms.shape[1:])
    # What began at -0.0 may still be -0.0, and 0.0 where it began at 0.0.
    return np.asarray(np.add.accumulate(terms, axis=0)[-1] + 0.0)


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
    sent = ClientScalars.of(scalars)
    values = np.clip(sent.matrix, -how.clip, how.clip) if how.clip else sent.matrix
    taken = ~np.isnan(values)
    if how.rule is Rule.MEAN:
        p = np.fromiter((weights[i] for i in sent), dtype=np.float64, count=len(sent))
        combined = in_order(np.where(taken, p[:, None] * values, 0.0))
    else:
        combined = np.array([_middle(values[taken[:, t], t], how) for t in range(values.shape[1])])
    found = np.zeros(count)
    found[: values.shape[1]] = combined
    return [round_fp32(value) for value in found.tolist()]


def _middle(taken: np.ndarray, how: Aggregation) -> float:
    """The median or trimmed mean of the scalars of one step, float64 in client-id order."""
    count = len(taken)
    if not count:
        return 0.0
    ordered = np.sort(taken, kind="stable")  # which keeps 0.0 and -0.0 in the clients' order
    if how.rule is Rule.MEDIAN:
        low, high = ordered[(count - 1) // 2], ordered[count // 2]
        return float(low if count % 2 else (low + high) / 2)
    cut = how.cut(count)
    kept = ordered[cut : count - cut].tolist()
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
