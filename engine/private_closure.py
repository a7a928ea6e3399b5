"""Differentially private scalars: each example's loss difference is clipped, and noise is added once per query.

    two-point             d = (sum_i clip(l_i(w + eps z) - l_i(w - eps z), -C, C) + sigma C N(0, 1)) / B
    forward difference    d = (sum_i clip(l_i(w + eps z) - l_i(w), -C, C) + sigma C N(0, 1)) / B

``d`` replaces the difference of the losses in the projected gradient. The forward passes are the same as in any other
step. Only one number per query is released, so clipping is free and the noise has one dimension.

References:
    DPZero, arXiv 2310.09639; DP-ZO, arXiv 2401.04343.
    Mironov 2012, "On significance of the least significant bits for differential privacy".
    Holohan and Braghin, arXiv 2107.10138: sums of several normals as a countermeasure, as in opacus' secure mode.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import stream
from .errors import ConfigError
from .estimator import check_estimator, check_queries

# Number of normals summed in one draw of noise.
_SUMMANDS = 4
# Distance between their element ids: each normal uses a separate Philox block of four words.
_ID_STRIDE = 4


def check_mechanism(clip: float, noise_multiplier: float, batch_size: int) -> None:
    """Raises ``ConfigError`` unless all three are positive, and clip and noise multiplier are finite."""
    for name, value in (("clip", clip), ("noise multiplier", noise_multiplier)):
        if not 0 < value < math.inf:
            raise ConfigError(f"the {name} of private steps must be finite and positive, got {value}")
    if batch_size < 1:
        raise ConfigError(f"the expected batch size of private steps must be at least 1, got {batch_size}")


def gaussian(seed: int, draw: int) -> float:
    """Draws a standard normal with float64 resolution: the sum of four of the stream's normals, divided by 2.

    A single normal of the stream is an fp32 function of 48 bits, with an absolute value of at most 5.77. The set of
    sums that it can produce may reveal the value it was added to. Four normals are a function of 192 bits, with an
    absolute value of at most 11.5.

    Args:
        seed: seed in [0, 2**64).
        draw: number of the draw, in [0, 2**59). Different draws of a seed are independent.

    Example:
        >>> gaussian(3, 0) != gaussian(3, 1) != gaussian(4, 1)
        True
    """
    ids = torch.arange(_SUMMANDS, device="cpu") * _ID_STRIDE + draw * _SUMMANDS * _ID_STRIDE
    return stream.normal(seed, ids, "torch").double().sum().item() / math.sqrt(_SUMMANDS)


class PrivateClosure:
    """Closure for one private step of ``SparseZO``, made from a function that returns the loss of each example.

    The estimators use only differences of losses, so the closure returns losses relative to a query's first evaluation:
    two-point returns 0, then ``-d``; forward difference returns 0 at ``w``, then each query's ``d``. All values are
    float64, except the returned number, which is fp32. The loss that the step returns has no meaning.

    A NaN difference counts as 0 and an infinite one is clipped. So no released value depends on an unbounded value, and
    no private step is skipped because of a loss. Adding or removing an example changes ``d`` by at most ``C / B``, if
    the loss of each example is independent of the other examples. Padding and the shape of a batch change the last bits
    of a loss; where this matters, let ``losses`` evaluate one example at a time.

    Args:
        losses: evaluates the step's batch at the current weights: float32 [n], the same examples in the same order in
            each call. ``n`` is the actual size of the batch and may be 0.
        estimator: the optimizer's estimator.
        clip: clipping bound ``C`` of each example's loss difference, positive.
        noise_multiplier: ``sigma``, positive: standard deviation of the noise divided by the clip.
        batch_size: expected batch size ``B``, at least 1; a constant that does not depend on ``n``.
        seed: seed of the step's noise, in [0, 2**64); query ``j`` uses its draw ``j``. It must be known only to the
            owner of the data and used for one step only: with it, the noise can be subtracted. Noise with a seed
            derived from the run's seed only simulates privacy. Philox passes statistical tests but is not a
            cryptographic generator.
        queries: the optimizer's number of queries per step.

    Raises:
        ConfigError: if clip, noise multiplier or batch size is out of range.
        ValueError: if the seed, the number of queries or the estimator is out of range.

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
        self._one_sided = check_estimator(estimator).is_one_sided
        self._calls = check_queries(queries) + 1 if self._one_sided else 2 * check_queries(queries)
        self._losses, self._clip, self._noise = losses, clip, noise_multiplier * clip
        self._batch_size, self._seed = batch_size, stream.check_seed(seed)
        self._calls_made = 0
        self._reference_losses = torch.empty(0, dtype=torch.float32, device="cpu")

    def __call__(self) -> Tensor:
        """Evaluates the losses and returns the closure's next value, float32 scalar.

        Raises:
            ValueError: after the last call of the step, or if ``losses`` does not return one loss per example, the same
                number in each call.
        """
        if self._calls_made == self._calls:
            raise ValueError(
                "a private closure serves one step only, because its noise must not be used twice; "
                "create a new closure for each step"
            )
        losses = self._losses().double()
        call, self._calls_made = self._calls_made, self._calls_made + 1
        shape, reference_shape = list(losses.shape), list(self._reference_losses.shape)
        if losses.dim() != 1 or (not self._is_reference(call) and shape != reference_shape):
            raise ValueError(
                f"private steps need one loss per example, the same number in each call: got shape {shape}"
                + (f" after {reference_shape}" if call else "")
            )
        if self._is_reference(call):
            self._reference_losses = losses
            return losses.new_zeros((), dtype=torch.float32)
        if self._one_sided:
            return self._add_noise(losses - self._reference_losses, query=call - 1)
        return -self._add_noise(self._reference_losses - losses, query=call // 2)

    def _is_reference(self, call: int) -> bool:
        """Whether call number ``call`` evaluates the reference losses, which later calls subtract."""
        return call == 0 if self._one_sided else call % 2 == 0

    def _add_noise(self, differences: Tensor, query: int) -> Tensor:
        """Computes ``d``, float32 scalar on the device of the losses, without waiting for the device."""
        clipped = torch.where(differences.isnan(), 0.0, differences).clamp(-self._clip, self._clip)
        return ((clipped.sum() + self._noise * gaussian(self._seed, query)) / self._batch_size).float()


__all__ = ["PrivateClosure", "check_mechanism", "gaussian"]
