"""GradIP: what the server sees of a client's path by its scalars alone.

    s_t = <grad_p * m, z_t * m>                             once a step for all clients, in float64
    GradIP_i^t = <grad_p * m, g_i^t (z_t * m)> = g_i^t s_t
    gradient norm = |g_i^t| ||z_t * m||,   cosine = GradIP / (||grad_p * m|| * gradient norm)

``grad_p`` is the mean gradient on pre-training text, kept with the mask.

References:
    Meerkat, arXiv 2506.03337, section 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..engine import backend as backends
from ..engine.device_values import DeviceValues
from ..engine.errors import MaskError
from ..engine.mask import SparseMask
from .scalars import ByClient, ClientScalars


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One client's steps as the server sees them, one number a step (and query).

    Args:
        gradip: inner product of the pre-training gradient and the client's zeroth-order gradient.
        norm: of the client's zeroth-order gradient.
        cosine: of the two, in [-1, 1]; 0 where the client's gradient is 0.
    """

    gradip: list[float]
    norm: list[float]
    cosine: list[float]


@dataclass(frozen=True, eq=False)
class Traces(ByClient, Mapping[int, Trace]):
    """The paths of some clients: a mapping from a client's id to its ``Trace``.

    Args:
        gradip: of ``Trace``, float64 [n, width].
        norm: likewise.
        cosine: likewise.
    """

    gradip: np.ndarray
    norm: np.ndarray
    cosine: np.ndarray

    def __getitem__(self, client: int) -> Trace:
        return Trace(**{name: self._own(getattr(self, name), client) for name in ("gradip", "norm", "cosine")})


class GradIP:
    """Regenerates paths from scalars.

    Args:
        mask: with its gradient.
        device: where to compute.
        backend: see ``backend.resolve``.

    Raises:
        MaskError: if the mask has no gradient.
    """

    def __init__(self, mask: SparseMask, device: torch.device, backend: str = "auto") -> None:
        if mask.gradient is None:
            raise MaskError(
                f"GradIP needs the gradient on pre-training text at the masked elements, which this mask "
                f"({mask.source}) does not hold; make one with `meerkat-engine mask --method meerkat`"
            )
        self._gradient, self._ids = mask.gradient.to(device), mask.ids.to(device)
        self._length = float(mask.gradient.double().norm())
        self._values, self._ops = DeviceValues(device), backends.resolve(backend, device)

    def traces(self, seeds: Sequence[int], scalars: Mapping[int, Sequence[float]]) -> Traces:
        """The paths of some clients.

        Args:
            seeds: of the steps.
            scalars: of each client, at most one a seed; NaN, a step that was not taken, counts as 0.
        """
        sent = ClientScalars.of(scalars)
        products = self._ops.inner(self._gradient, self._ids, self._values.seeds(seeds))[: sent.matrix.shape[1]]
        s, z_square = products.cpu().numpy().T
        g = np.where(np.isnan(sent.matrix), 0.0, sent.matrix)
        # Python's power, whose bits do not hang on NumPy's build; one a step.
        gradip, norm = g * s, np.abs(g) * np.array([square**0.5 for square in z_square.tolist()])
        longest = self._length * norm
        cosine = np.divide(gradip, longest, out=np.zeros_like(gradip), where=longest != 0)
        return Traces(sent.ids, sent.counts, gradip, norm, cosine)


__all__ = ["GradIP", "Trace", "Traces"]
