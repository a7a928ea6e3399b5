"""GradIP: inner product of the pre-training gradient and a client's zeroth-order gradient, computed from scalars.

    s_t = <grad_p * m, z_t * m>                             computed once a step for all clients, in float64
    GradIP_i^t = <grad_p * m, g_i^t (z_t * m)> = g_i^t s_t
    gradient norm = |g_i^t| ||z_t * m||,   cosine = GradIP / (||grad_p * m|| * gradient norm)

``grad_p`` is the mean gradient on pre-training text, which the mask stores.

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
    """Path of one client: one value of each statistic for each step and query.

    Args:
        gradip: inner product of the pre-training gradient and the client's zeroth-order gradient.
        norm: norm of the client's zeroth-order gradient.
        cosine: cosine of the angle between the two gradients, in [-1, 1]; 0 if the client's gradient is 0.
    """

    gradip: list[float]
    norm: list[float]
    cosine: list[float]


@dataclass(frozen=True, eq=False)
class Traces(ByClient, Mapping[int, Trace]):
    """The paths of some clients: a mapping from a client's id to its ``Trace``.

    Args:
        ids: see ``ByClient``.
        counts: see ``ByClient``.
        gradip: see ``Trace``; float64 [n, width].
        norm: see ``Trace``; float64 [n, width].
        cosine: see ``Trace``; float64 [n, width].
    """

    gradip: np.ndarray
    norm: np.ndarray
    cosine: np.ndarray

    def __getitem__(self, client: int) -> Trace:
        return Trace(**{name: self._row_of(getattr(self, name), client) for name in ("gradip", "norm", "cosine")})


class GradIP:
    """Computes the paths of clients from their scalars.

    Args:
        mask: a mask with the pre-training gradient.
        device: device of the computation.
        backend: see ``backend.resolve``.

    Raises:
        MaskError: if the mask has no gradient.
    """

    def __init__(self, mask: SparseMask, device: torch.device, backend: str = "auto") -> None:
        if mask.gradient is None:
            raise MaskError(
                f"GradIP needs the gradient on pre-training text at the masked elements, which this mask "
                f"({mask.source}) does not have; create a mask with `meerkat-engine mask --method meerkat`"
            )
        self._gradient, self._ids = mask.gradient.to(device), mask.ids.to(device)
        self._gradient_norm = float(mask.gradient.double().norm())
        self._values, self._ops = DeviceValues(device), backends.resolve(backend, device)

    def traces(self, seeds: Sequence[int], scalars: Mapping[int, Sequence[float]]) -> Traces:
        """Computes the paths of some clients.

        Args:
            seeds: seeds of the round's queries.
            scalars: each client's scalars, at most one for each seed. NaN (a skipped query) counts as 0.
        """
        sent = ClientScalars.from_lists(scalars)
        products = self._ops.inner(self._gradient, self._ids, self._values.seeds(seeds))[: sent.matrix.shape[1]]
        s, z_squared = products.cpu().numpy().T
        g = np.where(np.isnan(sent.matrix), 0.0, sent.matrix)
        # Python's power, one a query: its bits do not depend on how NumPy was built.
        z_norm = np.array([square**0.5 for square in z_squared.tolist()])
        gradip, norm = g * s, np.abs(g) * z_norm
        norms = self._gradient_norm * norm
        cosine = np.divide(gradip, norms, out=np.zeros_like(gradip), where=norms != 0)
        return Traces(sent.ids, sent.counts, gradip, norm, cosine)


__all__ = ["GradIP", "Trace", "Traces"]
