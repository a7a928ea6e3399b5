"""From the clients' answers to the round's: in float64, in client-id order, rounded to fp32 once.

    g^t = sum_i p_i g_i^t          a client that did not take a step contributes 0 to it

Reference: Meerkat, arXiv 2506.03337, section 3.
"""

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np

from ..weights import round_fp32


class Weighting(StrEnum):
    """How much each client counts: equally, or by its number of examples."""

    UNIFORM = "uniform"
    EXAMPLES = "examples"


def client_weights(examples: Mapping[int, int], weighting: Weighting) -> dict[int, float]:
    """``p_i`` of the clients that answered, in id order; they sum to 1.

    Args:
        examples: number of examples of each client, positive.
        weighting: the rule.
    """
    raw = {i: float(examples[i]) if weighting is Weighting.EXAMPLES else 1.0 for i in sorted(examples)}
    total = sum(raw.values())
    return {i: value / total for i, value in raw.items()}


def weighted_mean(scalars: Mapping[int, Sequence[float]], weights: Mapping[int, float], steps: int) -> list[float]:
    """The round's ``steps`` scalars; the order in which replies arrived does not matter.

    Args:
        scalars: of each client, at most ``steps``, NaN where it did not take one.
        weights: ``p_i`` of each client.
        steps: ``T``.
    """
    totals = [0.0] * steps
    for i in sorted(scalars):
        for t, g in enumerate(scalars[i]):
            totals[t] += 0.0 if math.isnan(g) else weights[i] * g
    return [round_fp32(total) for total in totals]


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


__all__ = ["Weighting", "client_weights", "mean_masters", "weighted_mean"]
