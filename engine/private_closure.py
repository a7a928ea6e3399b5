"""Differentially private scalars: the differences of losses are clipped example by example, and noise is added once.

    two-point             d = (sum_i clip(l_i(w + eps z) - l_i(w - eps z), -C, C) + sigma C N(0, 1)) / B
    forward difference    d = (sum_i clip(l_i(w + eps z) - l_i(w), -C, C) + sigma C N(0, 1)) / B

and ``d`` takes the place of the difference of the losses in the projected gradient. The forwards are those of any step;
all that leaves them is one number a query, so clipping costs nothing and the noise has one dimension.

References:
    DPZero, arXiv 2310.09639; DP-ZO, arXiv 2401.04343.
    Mironov 2012, "On significance of the least significant bits for differential privacy".
    Holohan and Braghin, arXiv 2107.10138: sums of several normals against that, as in opacus' secure mode.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import stream
from .errors import ConfigError
from .estimator import Estimator, check_estimator, check_queries

# Normals in a draw of noise, and how far apart their element ids are: each has a Philox block, four words, of its own.
_SUMMANDS, _APART = 4, 4


def check_mechanism(clip: float, noise_multiplier: float, batch_size: int) -> None:
    """Raises ``ConfigError`` unless all three are positive, and the first two finite."""
    for name, value in (("clip", clip), ("noise multiplier", noise_multiplier)):
        if not 0 < value < math.inf:
            raise ConfigError(f"the {name} of private steps must be finite and positive, got {value}")
    if batch_size < 1:
        raise ConfigError(f"the expected batch size of private steps must be at least 1, got {batch_size}")


def gaussian(seed: int, draw: int) -> float:
    """A standard normal with float64's resolution: the sum of four of the stream's normals, over 2.

    One of the stream's alone is a function of 48 bits in fp32 and ends at 5.77: which sums it can lead to, and which
    not, may tell what it was added to. Four are a function of 192 bits and end at 11.5.

    Args:
        seed: in [0, 2**64).
        draw: in [0, 2**59); different draws of a seed are independent.

    Example:
        >>> gaussian(3, 0) != gaussian(3, 1) != gaussian(4, 1)
        True
    """
    ids = torch.arange(_SUMMANDS) * _APART + draw * _SUMMANDS * _APART
    return stream.normal(seed, ids, "torch").double().sum().item() / math.sqrt(_SUMMANDS)


class PrivateClosure:
    """The closure of one step of ``SparseZO``, made from a function that returns the loss of every example.

    The estimators use nothing but differences of losses, so this returns losses relative to the first evaluation of a
    query: two-point 0, then ``-d``; forward difference 0 at ``w``, then each query's ``d``. All is in float64 until the
    number returned, which is fp32. The loss that the step returns says nothing.

    A difference that is NaN counts as 0 and an infinite one is clipped, so that nothing released depends on an
    unbounded value, and no private step is skipped because of a loss. Adding or removing an example changes ``d`` by
    ``C / B`` at most, if the loss of an example depends on no other. Padding and the shape of a batch change its last
    bits; where these matter, let ``losses`` take one example at a time.

    Args:
        losses: evaluates the step's batch at the weights as they are: float32 [n], the same examples in the same order
            each time. ``n`` is the batch's own size, which may be 0.
        estimator: the optimizer's, "two-point" or "forward-difference".
        clip: ``C``, positive: what an example can change of a difference of losses.
        noise_multiplier: ``sigma``, positive: standard deviation of the noise over the clip.
        batch_size: ``B``, the expected size of a batch; a constant, whatever ``n`` is.
        seed: of the step's noise, in [0, 2**64); query ``j`` uses draw ``j`` of it. It must be the secret of who holds
            the data and serve one step only: who knows it subtracts the noise. Noise from a seed that follows from the
            run's is a simulation of privacy, no more; and Philox, though it passes statistical tests, is no
            cryptographic generator.
        queries: of the optimizer.

    Raises:
        ConfigError: for a clip, noise multiplier or batch size out of range.
        ValueError: for a seed, number of queries or estimator out of range.

    Example:
        >>> step = [torch.tensor([0.5, 9.0]), torch.tensor([0.25, 1.0])]
        >>> closure = PrivateClosure(
        ...     lambda: step.pop(0), estimator="two-point", clip=1.0, noise_multiplier=1e-3, batch_size=2, seed=5)
        >>> closure().item(), round(-closure().item(), 1)  # (0.25 + 1) / 2, and a little noise
        (0.0, 0.6)
    """

    def __init__(
        self,
        losses: Callable[[], Tensor],
        *,
        estimator: str,
        clip: float,
        noise_multiplier: float,
        batch_size: int,
        seed: int,
        queries: int = 1,
    ) -> None:
        check_mechanism(clip, noise_multiplier, batch_size)
        self._one_sided = check_estimator(estimator) is Estimator.FORWARD_DIFFERENCE
        self._calls = check_queries(queries) + 1 if self._one_sided else 2 * check_queries(queries)
        self._losses, self._clip, self._noise = losses, clip, noise_multiplier * clip
        self._batch_size, self._seed = batch_size, stream.check_seed(seed)
        self._called = 0
        self._before = torch.empty(0)

    def __call__(self) -> Tensor:
        """The next evaluation, float32 scalar.

        Raises:
            ValueError: after the step's last, or if there is not one loss an example, the same number each time.
        """
        if self._called == self._calls:
            raise ValueError("a private closure is of one step, since noise must not serve twice; make one for each")
        now = self._losses().double()
        number, self._called = self._called, self._called + 1
        if now.dim() != 1 or (number and not self._is_reference(number) and now.shape != self._before.shape):
            raise ValueError(
                f"private steps need one loss an example, the same number each time: got shape {list(now.shape)}"
                + (f" after {list(self._before.shape)}" if number else "")
            )
        if self._is_reference(number):
            self._before = now
            return now.new_zeros((), dtype=torch.float32)
        if self._one_sided:
            return self._add_noise(now - self._before, number - 1)
        return -self._add_noise(self._before - now, number // 2)

    def _is_reference(self, number: int) -> bool:
        """Whether a call is the one that others are compared with."""
        return number == 0 if self._one_sided else number % 2 == 0

    def _add_noise(self, differences: Tensor, query: int) -> Tensor:
        """``d``, float32 scalar on the device of the losses; nothing waits for it."""
        clipped = torch.where(differences.isnan(), 0.0, differences).clamp(-self._clip, self._clip)
        return ((clipped.sum() + self._noise * gaussian(self._seed, query)) / self._batch_size).float()


__all__ = ["PrivateClosure", "check_mechanism", "gaussian"]
