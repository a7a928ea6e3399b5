"""Backends of the masked operations. All backends give the same bits.

triton   the kernels
torch    the reference
numba    the reference with normals drawn by compiled code: many times faster on a CPU
"""

import functools
import importlib.util
from ctypes import c_float
from typing import Protocol

import torch
from torch import Tensor

from ..triton_kernels import ElementTable, reference
from .caller_warnings import warn_caller
from .errors import ConfigError
from .extras import install_hint

BACKENDS = ("auto", "torch", "numba", "triton")

# Maximum number of normals kept from a step's first perturbation to its update: 64 MiB. For larger masks they are
# drawn again in each operation.
KEPT_NORMALS = 1 << 24
# Maximum number of normals kept for later steps: 8 MiB. The clients of a round and its replay have the same seeds.
_KEPT_FOR_LATER = 1 << 21


class Backend(Protocol):
    """The masked operations; see ``triton_kernels.reference`` for what each does."""

    def normal(self, seed: int, ids: Tensor) -> Tensor:
        """Draws ``z`` for element ids: float32 [n]."""

    def inner(self, gradient: Tensor, ids: Tensor, seeds: Tensor) -> Tensor:
        """Computes ``<gradient, z>`` and ``<z, z>`` for each seed: float64 [n, 2]."""

    def perturb_(self, table: ElementTable, master: Tensor, seed: Tensor, scale: Tensor) -> None:
        """Sets ``w <- cast(master + scale * z)``."""

    def restore_(self, table: ElementTable, master: Tensor) -> None:
        """Sets ``w <- cast(master)``."""

    def coefficients(self, losses: Tensor, eps: Tensor, lr: Tensor) -> Tensor:
        """Computes mean loss, projected gradient and coefficients: float32 [2 + groups]."""

    def compare(self, table: ElementTable, master: Tensor, counts: Tensor) -> None:
        """Counts live weights that are not ``cast(master)``, and masters that the weights cannot hold."""

    def update_(
        self, table: ElementTable, master: Tensor, seed: Tensor, c: Tensor, *, applied: Tensor | None, number: int
    ) -> None:
        """Applies ``master <- master - c * z``, then ``w <- cast(master)``."""

    def update_perturb_(
        self,
        table: ElementTable,
        master: Tensor,
        seed: Tensor,
        c: Tensor,
        next_seed: Tensor,
        scale: Tensor,
        *,
        applied: Tensor | None,
        number: int,
    ) -> None:
        """Does ``update_``, then ``perturb_`` with the next seed, in one pass."""

    def replay_(
        self, table: ElementTable, master: Tensor, seeds: Tensor, c: Tensor, *, applied: Tensor | None, number: int
    ) -> None:
        """Does ``update_`` for each (seed, c) in order, in one pass."""

    def parts(self, table: ElementTable) -> int:
        """Number of parts that an update changes one after the other: the length of ``applied``."""


class TorchBackend:
    """The reference. It keeps the normals of the last seeds: +eps, -eps and the update of a step draw them only once.

    Args:
        source: implementation that draws the normals.
        access: implementation that reads and writes the weights.
    """

    def __init__(self, source: reference.NormalSource, access: reference.WeightAccess = reference.TORCH_ACCESS) -> None:
        self._source, self._access = source, access
        # By id(table): the table, which keeps its id, and z [slots] by seed, the oldest first.
        self._kept: dict[int, tuple[ElementTable, dict[int, Tensor]]] = {}
        self.normal = source.normal
        self.restore_ = functools.partial(reference.restore_, access=access)
        self.compare = functools.partial(reference.compare, access=access)

    def coefficients(self, losses: Tensor, eps: Tensor, lr: Tensor) -> Tensor:
        """See ``reference.coefficients``. On a CPU the same float64 operations are Python's, which takes a fraction."""
        if losses.device.type != "cpu":
            return reference.coefficients(losses, eps, lr)
        plus, minus = losses.tolist()
        g = c_float((plus - minus) / (2 * eps.item())).value
        return torch.tensor(
            [(plus + minus) * 0.5, g, *(rate * g for rate in lr.tolist())], dtype=torch.float32, device="cpu"
        )

    def inner(self, gradient: Tensor, ids: Tensor, seeds: Tensor) -> Tensor:
        """See ``reference.inner``."""
        return reference.inner(gradient, ids, seeds, self.normal)

    def perturb_(self, table: ElementTable, master: Tensor, seed: Tensor, scale: Tensor) -> None:
        """See ``reference.perturb_``."""
        reference.perturb_(table, master, seed, scale, self._draw, self._access)

    def update_(
        self,
        table: ElementTable,
        master: Tensor,
        seed: Tensor,
        c: Tensor,
        *,
        applied: Tensor | None = None,
        number: int = 0,
    ) -> None:
        """See ``reference.update_``."""
        reference.update_(table, master, seed, c, self._draw, self._access, applied=applied, number=number)

    def update_perturb_(
        self,
        table: ElementTable,
        master: Tensor,
        seed: Tensor,
        c: Tensor,
        next_seed: Tensor,
        scale: Tensor,
        *,
        applied: Tensor | None = None,
        number: int = 0,
    ) -> None:
        """See ``reference.update_perturb_``."""
        reference.update_perturb_(
            table, master, seed, c, next_seed, scale, self._draw, self._access, applied=applied, number=number
        )

    def replay_(
        self,
        table: ElementTable,
        master: Tensor,
        seeds: Tensor,
        c: Tensor,
        *,
        applied: Tensor | None = None,
        number: int = 0,
    ) -> None:
        """See ``reference.replay_``."""
        reference.replay_(table, master, seeds, c, self._draw_once, self._access, applied=applied, number=number)

    def parts(self, table: ElementTable) -> int:
        """One part for each window of the reference."""
        return len(list(reference.windows(table)))

    def _draw(self, table: ElementTable, seed: Tensor, start: int, stop: int) -> Tensor:
        """Draws the normals for the slots [start, stop), or takes them from an earlier draw with the same seed."""
        if table.slots > KEPT_NORMALS:
            return reference.table_normals(table, seed, start, stop, self._source)
        _, kept = self._kept.setdefault(id(table), (table, {}))
        number = reference.seed_of(seed)
        if number not in kept:
            z = reference.table_normals(table, seed, 0, table.slots, self._source)
            while kept and (len(kept) + 1) * table.slots > _KEPT_FOR_LATER:
                del kept[next(iter(kept))]
            kept[number] = z
        return reference.part(kept[number], start, stop)

    def _draw_once(self, table: ElementTable, seed: Tensor, start: int, stop: int) -> Tensor:
        """Does ``_draw`` for a seed that is not needed again soon: a new draw is not kept."""
        _, kept = self._kept.get(id(table), (table, {}))
        z = kept.get(reference.seed_of(seed))
        return (
            reference.table_normals(table, seed, start, stop, self._source)
            if z is None
            else reference.part(z, start, stop)
        )


class TritonBackend:
    """The Triton kernels: one launch per operation; normals are computed in registers and never stored.

    Args:
        device: device of the weights.

    Raises:
        ConfigError: if triton is not installed, or the kernels cannot run on this device in this process.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            from triton.runtime.jit import JITFunction

            from ..triton_kernels import coefficients, compare, inner, normal, perturb, replay, restore, update
        except ImportError as error:
            raise ConfigError(f"backend 'triton' needs the package triton: {error}; use backend='torch'") from error
        interpreted = not isinstance(perturb._perturb_kernel, JITFunction)
        if device.type == "cpu" and not interpreted:
            raise ConfigError(
                "backend 'triton' on CPU tensors runs in Triton's interpreter: set TRITON_INTERPRET=1 before the first "
                "import of the kernels, or use backend='torch'"
            )
        if device.type != "cpu" and interpreted:
            raise ConfigError(
                f"Triton's interpreter cannot write through {device.type} addresses: unset TRITON_INTERPRET and start "
                f"a new process"
            )
        self.normal = normal.normal
        self.inner = inner.inner
        self.perturb_ = perturb.perturb_
        self.restore_ = restore.restore_
        self.coefficients = coefficients.coefficients
        self.compare = compare.compare
        self.update_ = update.update_
        self.update_perturb_ = update.update_perturb_
        self.replay_ = replay.replay_

    def parts(self, table: ElementTable) -> int:
        """A launch is one part: an exception comes before it or after it, never in the middle."""
        return 1


def _numba_backend(device: torch.device) -> Backend:
    if device.type != "cpu":
        raise ConfigError(f"backend 'numba' works on CPU tensors, these are on {device}; use backend='auto'")
    try:
        from ..triton_kernels import numba_access, numba_normal
    except RuntimeError as error:  # numba raises it on decoration if it finds no directory for its cache
        raise ConfigError(
            f"backend 'numba' cannot cache its compiled code: {error}; "
            f"set NUMBA_CACHE_DIR to a writable directory, or use backend='torch'"
        ) from error
    except Exception as error:  # of many kinds, if numba does not fit the installed NumPy or lacks a library
        raise ConfigError(
            f"backend 'numba' needs the package numba ({error}); {install_hint('cpu')}, or use backend='torch'"
        ) from error
    return TorchBackend(
        reference.NormalSource(numba_normal.normal, numba_normal.normal_run),
        reference.WeightAccess(numba_access.scatter_, numba_access.gather),
    )


@functools.cache
def _numba_works() -> bool:
    """Whether numba can be used; warns, once, if it is installed and cannot."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        _numba_backend(torch.device("cpu"))
    except ConfigError as error:
        warn_caller(f"normals are drawn by torch, which is several times slower: {error}")
        return False
    return True


def resolve(backend: str, device: torch.device) -> Backend:
    """Returns the backend with this name for tensors on this device.

    Args:
        backend: "triton", "torch", "numba", or "auto": triton on GPUs (CUDA or ROCm); on CPUs numba where it is
            installed and works; torch elsewhere.
        device: device of the weights.

    Raises:
        ConfigError: if the name is unknown, or the backend is not available for this device.
    """
    if backend == "auto":
        if device.type == "cuda":
            backend = "triton"
        elif device.type == "cpu" and _numba_works():
            backend = "numba"
        else:
            backend = "torch"
    if backend == "torch":
        return TorchBackend(reference.TORCH_SOURCE)
    if backend == "numba":
        return _numba_backend(device)
    if backend == "triton":
        return TritonBackend(device)
    raise ConfigError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")


__all__ = ["BACKENDS", "KEPT_NORMALS", "Backend", "TorchBackend", "TritonBackend", "resolve"]
