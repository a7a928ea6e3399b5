"""What a private federation tells the server, in (epsilon, delta): terms of a client's noise, and the accountant.

A step takes every example of a client with probability ``B / n`` and adds Gaussian noise to what it sends (see
``engine/privacy.py``). Steps compose; the q scalars of a step are of one batch, and together one Gaussian of noise
multiplier ``sigma / sqrt(q)``. Neighbours are data sets of a client that differ by one example, added or removed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..engine.errors import ConfigError
from ..engine.extras import install_hint
from ..engine.private_closure import check_mechanism

# Privacy losses are rounded up to multiples of an interval: this one, or as much more as keeps the numbers of them that
# all steps without sampling would reach below the other (measured: a second or two, and the same four digits).
_INTERVAL, _MOST_POINTS = 1e-4, 1e7


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """How a client keeps its examples private.

    Args:
        clip: ``C``, what an example may change of a difference of losses; positive.
        noise_multiplier: ``sigma``, standard deviation of the noise over the clip; positive.
        delta: in (0, 1), the probability that epsilon leaves out; well below one over the number of examples.
        batch_size: ``B``, the expected number of examples in a batch, at least 1.

    Raises:
        ConfigError: saying which is out of range.
    """

    clip: float
    noise_multiplier: float
    delta: float
    batch_size: int

    def __post_init__(self) -> None:
        check_mechanism(self.clip, self.noise_multiplier, self.batch_size)
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta must be in (0, 1), got {self.delta}")


def epsilon(privacy: Privacy, examples: int, steps: int, queries: int = 1) -> float:
    """What a client has spent after some steps: (epsilon, delta) differential privacy, by privacy loss distributions.

    An upper bound, for ideal noise, secret sampling and secret seeds. The number of examples itself is not protected.

    Args:
        privacy: the client's terms.
        examples: ``n``, the client's number of examples; at least the batch size.
        steps: in all rounds together, those of the calibration too.
        queries: ``q``, of a step.

    Raises:
        ConfigError: if the package dp-accounting is missing, or a number is out of range.

    References:
        Koskela et al., arXiv 1906.03049; Doroshenko et al., arXiv 2207.04380 (the accountant's discretisation).
    """
    if not privacy.batch_size <= examples or steps < 0 or queries < 1:
        raise ConfigError(
            f"epsilon needs at least as many examples as a batch ({privacy.batch_size}), no negative number of steps, "
            f"and a query a step; got {examples} examples, {steps} steps and {queries} queries"
        )
    if steps == 0:
        return 0.0
    dp_accounting, pld = _accounting()
    noise = privacy.noise_multiplier / math.sqrt(queries)
    step = dp_accounting.PoissonSampledDpEvent(privacy.batch_size / examples, dp_accounting.GaussianDpEvent(noise))
    accountant = pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, _interval(math.sqrt(steps) / noise)
    )
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    found = float(accountant.get_epsilon(privacy.delta))
    if not math.isfinite(found):
        raise ConfigError(
            f"with noise multiplier {privacy.noise_multiplier:g}, {steps} steps have no finite epsilon at delta "
            f"{privacy.delta:g}; raise delta or the noise"
        )
    return found


def largest_epsilon(privacy: Privacy, spent: Iterable[tuple[int, int]], queries: int = 1) -> float:
    """The ``epsilon`` of the client that is protected least.

    Args:
        privacy: the clients' terms.
        spent: number of examples and of steps of each.
        queries: ``q``, of a step.
    """
    found, most = 0.0, 0
    for examples, steps in sorted(set(spent), key=lambda each: (each[0], -each[1])):
        if steps > most:  # whoever has more examples and took no more steps is protected better
            found, most = max(found, epsilon(privacy, examples, steps, queries)), steps
    return found


def _interval(mu: float) -> float:
    """For losses that, without sampling, are normal with mean ``mu**2 / 2`` and standard deviation ``mu``."""
    return max(_INTERVAL, (mu**2 / 2 + 10 * mu) / _MOST_POINTS)


def _accounting() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError as error:
        raise ConfigError(
            f"accounting for privacy needs the package dp-accounting ({error}); {install_hint('dp')}"
        ) from error
    return dp_accounting, pld


__all__ = ["Privacy", "epsilon", "largest_epsilon"]
