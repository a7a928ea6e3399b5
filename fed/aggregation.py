"""Aggregation of the clients' scalars into those of the round, in float64 with one rounding to fp32 at the end.

The result does not depend on the order in which answers arrived. For each step and query, one of these rules applies:

    mean           g^t = sum_i p_i g_i^t, summed in the order of client ids; a skipped scalar contributes 0, and so does
                   a client that is stopped early, in the steps that it does not take (``StoppedWeight``)
    median         median of the scalars that were not skipped, all with the same weight; for an even number of them,
                   the mean of the two in the middle
    trimmed-mean   mean of the n scalars that were not skipped, without the floor(trim n) smallest and largest

Before any rule, scalars are clipped to [-clip, clip]. If all clients skipped a scalar, the aggregate is 0.

Robustness: with the mean, a single client that sends large scalars determines the result, and so does one that claims
many examples. The median stays within the range of the honest scalars while fewer than half are hostile, the trimmed
mean while at most floor(trim n) are. For fewer than 1 / trim scalars, the trimmed mean is the plain mean and protects
against nobody. Median and trimmed mean ignore ``p_i``, because a client can also lie about its number of examples.

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
    """Weighting of the clients: equal, or by number of examples."""

    UNIFORM = "uniform"
    EXAMPLES = "examples"


class Rule(StrEnum):
    """Aggregation rule for the scalars of a query."""

    MEAN = "mean"
    MEDIAN = "median"
    TRIMMED_MEAN = "trimmed-mean"


class StoppedWeight(StrEnum):
    """The weight ``p_i`` of a client that is stopped early, in the steps of a round that it does not take.

    KEEP is the weighted mean of the clients' weights: the client stays where it stopped, so the others' steps count for
    less. With SHARE, the weights of the clients that take a step sum to 1 again: ``g^t`` is divided by their sum. A
    client takes a step if it sends a scalar for it or skips it, so a skipped scalar contributes 0 with both.
    """

    KEEP = "keep"
    SHARE = "share"


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """Settings of the aggregation.

    Args:
        rule: aggregation rule for scalars.
        weighting: weighting ``p_i`` of the clients, for the mean of scalars and for the mean of weights (clients that
            train by backpropagation).
        trim: fraction of the scalars that the trimmed mean removes at each end, in (0, 0.5).
        clip: absolute value to which larger scalars are clipped; 0: no clipping.
        stopped_weight: what happens, in the mean, to the weight of a client in the steps that it does not take.

    Raises:
        ConfigError: if ``trim`` or ``clip`` is out of range, or weights are shared under a rule that has none.
    """

    rule: Rule = Rule.MEAN
    weighting: Weighting = Weighting.EXAMPLES
    trim: float = 0.2
    clip: float = 0.0
    stopped_weight: StoppedWeight = StoppedWeight.KEEP

    def __post_init__(self) -> None:
        if not 0 < self.trim < 0.5:
            raise ConfigError(f"trim must be in (0, 0.5), got {self.trim}")
        if not 0 <= self.clip < math.inf:
            raise ConfigError(f"clip must be finite and not negative (0: no clipping), got {self.clip}")
        if self.stopped_weight is StoppedWeight.SHARE and self.rule is not Rule.MEAN:
            raise ConfigError(
                f"stopped_weight share is about weights, and {self.rule} has none: it leaves out the clients that do "
                f"not take a step; leave stopped_weight out"
            )

    def cut(self, clients: int) -> int:
        """Number of scalars that the trimmed mean removes at each end.

        Args:
            clients: number of clients with a scalar.
        """
        return math.floor(Fraction(str(self.trim)) * clients)  # exact in decimals: 0.29 * 100 is 29, in floats 28.99...


def client_weights(examples: Mapping[int, int], weighting: Weighting) -> dict[int, float]:
    """Computes the weights ``p_i`` of the clients that answered.

    Args:
        examples: number of examples of each client, positive.
        weighting: whether clients are weighted equally or by examples.

    Returns:
        The weight of each client, in the order of ids. The weights sum to 1.
    """
    ids = sorted(examples)
    raw = [examples[i] if weighting is Weighting.EXAMPLES else 1 for i in ids]
    total = sum(raw)
    return {i: count / total for i, count in zip(ids, raw, strict=True)}


def sum_in_order(terms: np.ndarray) -> np.ndarray:
    """Sums over the first axis one term after the other, as a loop that starts from 0.0 (``np.sum`` adds in pairs).

    Args:
        terms: the terms, float64 [n, ...].
    """
    if not len(terms):
        return np.zeros(terms.shape[1:])
    # The accumulated sum starts from the first term and may be -0.0; a loop that starts from 0.0 gives 0.0.
    return np.asarray(np.add.accumulate(terms, axis=0)[-1] + 0.0)


def aggregate(
    scalars: Mapping[int, Sequence[float]], weights: Mapping[int, float], count: int, aggregation: Aggregation
) -> list[float]:
    """Aggregates the clients' scalars.

    Args:
        scalars: scalars of each client, at most ``count``; NaN for a skipped query. A client with fewer does not take
            the last steps.
        weights: weight ``p_i`` of each client.
        count: number of scalars of the round, ``T q``.
        aggregation: the rule and its settings.

    Returns:
        The round's scalars, [count], each an fp32 value.
    """
    sent = ClientScalars.from_lists(scalars)
    clip = aggregation.clip
    values = np.clip(sent.matrix, -clip, clip) if clip else sent.matrix
    present = ~np.isnan(values)
    if aggregation.rule is Rule.MEAN:
        p = np.fromiter((weights[i] for i in sent), dtype=np.float64, count=len(sent))
        combined = sum_in_order(np.where(present, p[:, None] * values, 0.0))
        if aggregation.stopped_weight is StoppedWeight.SHARE:
            combined /= _weight_of_takers(p, sent.counts, values.shape[1])
    else:
        combined = np.array(
            [_median_or_trimmed_mean(values[present[:, t], t], aggregation) for t in range(values.shape[1])]
        )
    result = np.zeros(count)
    result[: values.shape[1]] = combined
    return [round_fp32(value) for value in result.tolist()]


def _weight_of_takers(p: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
    """Sum of the weights of the clients that take a step, float64 [width], one for each query.

    It is 1 where all clients take it, so that there the mean has the bits that it has without stopped clients.

    Args:
        p: weight of each client, float64 [n].
        counts: number of scalars of each client, int64 [n].
        width: the largest of them.
    """
    takes = np.arange(width) < counts[:, None]
    return np.where(takes.all(axis=0), 1.0, sum_in_order(np.where(takes, p[:, None], 0.0)))


def _median_or_trimmed_mean(values: np.ndarray, aggregation: Aggregation) -> float:
    """Median or trimmed mean of one query's scalars, float64 [n] in the order of client ids; 0 if there are none."""
    count = len(values)
    if not count:
        return 0.0
    ordered = np.sort(values, kind="stable")  # stable: keeps 0.0 and -0.0 in the order of clients
    if aggregation.rule is Rule.MEDIAN:
        low, high = ordered[(count - 1) // 2], ordered[count // 2]
        return float(low if count % 2 else (low + high) / 2)
    cut = aggregation.cut(count)
    kept = ordered[cut : count - cut].tolist()
    return math.fsum(kept) / len(kept)


def mean_masters(masters: Mapping[int, np.ndarray | None], weights: Mapping[int, float]) -> np.ndarray:
    """Weighted mean of the masked weights of clients that train by backpropagation.

    Args:
        masters: masked weights of each client, float32 [k].
        weights: weight ``p_i`` of each client.

    Returns:
        The mean, float32 [k], computed in float64 in the order of client ids.
    """
    total: np.ndarray | float = 0.0
    for i in sorted(weights):
        own = masters[i]
        assert own is not None
        total = total + weights[i] * own.astype(np.float64)
    return np.asarray(total, dtype=np.float32)


__all__ = [
    "Aggregation",
    "Rule",
    "StoppedWeight",
    "Weighting",
    "aggregate",
    "client_weights",
    "mean_masters",
    "sum_in_order",
]
