"""Which code runs the masked operations: the Triton kernels or the plain-torch reference. Same bits either way."""

from typing import Protocol

import torch
from torch import Tensor

from .errors import ConfigError
from .triton_kernels import ElementTable, reference

BACKENDS = ("auto", "torch", "triton")

# Normals kept from the first perturbation of a step to its update, at most: 64 MiB. A larger mask draws them anew.
_KEEP = 1 << 24


class Backend(Protocol):
    """The masked operations; see ``triton_kernels.reference`` for what each does."""

    def normal(self, seed: int, ids: Tensor) -> Tensor:
        """``z`` at element ids: float32 [n]."""

    def perturb_(self, table: ElementTable, master: Tensor, seed: int, scale: float) -> None:
        """``w <- cast(master + scale * z)``."""

    def restore_(self, table: ElementTable, master: Tensor) -> None:
        """``w <- cast(master)``."""

    def update_(self, table: ElementTable, master: Tensor, seed: int, c: float) -> None:
        """``master <- master - c * z``, ``w <- cast(master)``."""


class TorchBackend:
    """The reference, drawing the normals of a step once: +eps, -eps and the update share them."""

    def __init__(self) -> None:
        self._drawn: dict[int, tuple[int, Tensor]] = {}  # id(table) -> seed, z [nnz]

    def normal(self, seed: int, ids: Tensor) -> Tensor:
        """See ``reference.normal``."""
        return reference.normal(seed, ids)

    def perturb_(self, table: ElementTable, master: Tensor, seed: int, scale: float) -> None:
        """See ``reference.perturb_``."""
        reference.perturb_(table, master, seed, scale, self._z(table, seed))

    def restore_(self, table: ElementTable, master: Tensor) -> None:
        """See ``reference.restore_``."""
        reference.restore_(table, master)

    def update_(self, table: ElementTable, master: Tensor, seed: int, c: float) -> None:
        """See ``reference.update_``."""
        reference.update_(table, master, seed, c, self._z(table, seed))

    def _z(self, table: ElementTable, seed: int) -> Tensor | None:
        if table.nnz > _KEEP:
            return None
        known = self._drawn.get(id(table))
        if known is None or known[0] != seed:
            self._drawn[id(table)] = known = seed, reference.normal(seed, table.ids(0, table.nnz))
        return known[1]


class TritonBackend:
    """The kernels: one launch an operation, normals made in registers and never stored."""

    def __init__(self, device: torch.device) -> None:
        try:
            from triton.runtime.jit import JITFunction

            from .triton_kernels import normal, perturb, restore, update
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
        self.perturb_ = perturb.perturb_
        self.restore_ = restore.restore_
        self.update_ = update.update_


def resolve(backend: str, device: torch.device) -> Backend:
    """The backend of that name for tensors on that device.

    Args:
        backend: "triton", "torch", or "auto": triton on GPUs (CUDA or ROCm), torch elsewhere.
        device: of the weights.

    Raises:
        ConfigError: if the name is unknown, or triton is not to be had for this device.
    """
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "torch"
    if backend == "torch":
        return TorchBackend()
    if backend == "triton":
        return TritonBackend(device)
    raise ConfigError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")


__all__ = ["BACKENDS", "Backend", "TorchBackend", "TritonBackend", "resolve"]
