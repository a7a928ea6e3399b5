"""Differential privacy of a client's scalars: its settings, and the accountant that computes epsilon.

In a step, a client samples each of its n examples with probability ``B / n`` and adds Gaussian noise to its scalars
(see ``engine/private_closure.py``). The accountant composes all steps. The q scalars of a step use the same batch, and
together are one Gaussian mechanism with noise multiplier ``sigma / sqrt(q)``. Two data sets of a client are neighbours
if they differ by one example, added or removed.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..engine.errors import ConfigError
from ..engine.extras import install_hint
from ..engine.private_closure import check_mechanism

# The accountant rounds privacy losses up to multiples of an interval. The interval is _INTERVAL, or larger if the
# composition of all steps without sampling would have more than _MAX_POINTS values (measured: epsilon then takes a
# second or two, and has the same four digits).
_INTERVAL, _MAX_POINTS = 1e-4, 1e7


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Settings of the differential privacy of a client's examples.

    Args:
        clip: ``C``, maximum change of a loss difference that one example may cause; positive.
        noise_multiplier: ``sigma``, standard deviation of the noise divided by ``C``; positive.
        delta: probability with which the bound epsilon may fail, in (0, 1). It should be well below one over the number
            of examples.
        batch_size: ``B``, expected number of examples in a batch, at least 1.

    Raises:
        ConfigError: if a value is out of range; the error names it.
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
    """Computes the epsilon that a client has spent after some steps, with privacy loss distributions.

    The result is an upper bound on epsilon in (epsilon, delta) differential privacy. It assumes ideal Gaussian noise,
    and that the sampling and the seeds of the noise are secret. The number of examples is not protected.

    Args:
        privacy: the client's privacy settings.
        examples: ``n``, the client's number of examples, at least the batch size.
        steps: total number of steps in all rounds, including the calibration.
        queries: ``q``, number of queries of a step.

    Raises:
        ConfigError: if the package dp-accounting is missing, a number is out of range, or epsilon is infinite.

    References:
        Koskela et al., arXiv 1906.03049; Doroshenko et al., arXiv 2207.04380 (the accountant's discretisation).
    """
    if not privacy.batch_size <= examples or steps < 0 or queries < 1:
        raise ConfigError(
            f"epsilon needs at least {privacy.batch_size} examples (a batch), 0 steps and 1 query a step; "
            f"got {examples} examples, {steps} steps and {queries} queries"
        )
    if steps == 0:
        return 0.0
    noise = privacy.noise_multiplier / math.sqrt(queries)
    start, step = _privacy_losses(noise, privacy.batch_size / examples, _interval(math.sqrt(steps) / noise))
    result = float(start.compose(step.self_compose(steps)).get_epsilon_for_delta(privacy.delta))
    if not math.isfinite(result):
        raise ConfigError(
            f"epsilon of {steps} steps is infinite with noise multiplier {privacy.noise_multiplier:g} and delta "
            f"{privacy.delta:g}; increase the noise multiplier or delta"
        )
    return result


def largest_epsilon(privacy: Privacy, spent: Iterable[tuple[int, int]], queries: int = 1) -> float:
    """Computes the largest epsilon of some clients.

    Args:
        privacy: the clients' privacy settings.
        spent: (number of examples, number of steps) of each client.
        queries: ``q``, number of queries of a step.

    Returns:
        The ``epsilon`` of the client with the least protection; 0 if there are no clients.
    """
    largest, max_steps = 0.0, 0
    # A client with more examples and no more steps than another has a smaller epsilon, so it is left out.
    for examples, steps in sorted(set(spent), key=lambda client: (client[0], -client[1])):
        if steps > max_steps:
            largest, max_steps = max(largest, epsilon(privacy, examples, steps, queries)), steps
    return largest


class Releases:
    """Counts what private clients have released, for their epsilon.

    Every client that has sent a message counts, accepted or not, with all steps that it was asked for; "stale" releases
    nothing and does not count. A client from which nothing has come does not count: nobody has seen anything of its
    examples.

    Args:
        privacy: the clients' privacy settings; None: the clients are not private, and nothing is counted.
        queries: ``q``, number of queries of a step.

    Attributes:
        of_rejected: number of examples, by client, of clients whose messages were rejected. It counts until an answer
            of the client is accepted.
    """

    def __init__(self, privacy: Privacy | None, queries: int) -> None:
        self._privacy, self._queries = privacy, queries
        self.of_rejected: dict[int, int] = {}

    def add_rejected(self, client: int, examples: int | None) -> None:
        """Counts a rejected message.

        Args:
            client: the sender.
            examples: number of examples in the message; None: it cannot be read. Then the client counts with the fewest
                that it may have, a batch, which give the largest epsilon.
        """
        if self._privacy is not None:
            least = self._privacy.batch_size
            examples = max(examples or least, least)
            self.of_rejected[client] = min(examples, self.of_rejected.get(client, examples))

    def epsilon(self, steps: Mapping[int, int], examples: Mapping[int, int]) -> float | None:
        """Computes the largest epsilon that any client has spent; None if the clients are not private.

        Args:
            steps: number of steps requested so far, by client.
            examples: number of examples of the clients of which an answer was accepted.
        """
        if self._privacy is None:
            return None
        spent = {(count, steps[client]) for client, count in {**self.of_rejected, **examples}.items()}
        return largest_epsilon(self._privacy, spent, self._queries)


def _interval(mu: float) -> float:
    """Interval for privacy losses that, without sampling, are normal with mean ``mu**2 / 2`` and deviation ``mu``."""
    return max(_INTERVAL, (mu**2 / 2 + 10 * mu) / _MAX_POINTS)


@functools.lru_cache(maxsize=64)
def _privacy_losses(noise: float, rate: float, interval: float) -> tuple[Any, Any]:
    """Privacy loss distributions of no step and of one step. To make them takes most of the time of ``epsilon``.

    Args:
        noise: noise multiplier of the step's queries together.
        rate: probability with which an example is in the step's batch, in (0, 1].
        interval: interval of the discretisation.
    """
    try:
        from dp_accounting.pld import privacy_loss_distribution as pld
    except ImportError as error:
        raise ConfigError(
            f"computing epsilon needs the package dp-accounting ({error}); {install_hint('dp')}"
        ) from error
    step = pld.from_gaussian_mechanism(noise, value_discretization_interval=interval, sampling_prob=rate)
    return pld.identity(value_discretization_interval=interval), step


__all__ = ["Privacy", "Releases", "epsilon", "largest_epsilon"]
