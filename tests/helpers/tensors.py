"""Comparing weights bit for bit, and what a GPU would have to wait for."""

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of every bit: NaN equals itself, -0 differs from +0."""
    as_ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(as_ints[a.element_size()]), b.contiguous().view(as_ints[b.element_size()])
    )  # fmt: skip


def flat_weights(model: nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def fp32(*values: float) -> torch.Tensor:
    """A float32 vector."""
    return torch.tensor(values, dtype=torch.float32)


def fp32_array(*values: float) -> np.ndarray:
    """A float32 NumPy vector."""
    return np.array(values, dtype=np.float32)


class NothingIsReadBack(TorchDispatchMode):
    """Refuses what makes the host wait for a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read back"
        return func(*args, **(kwargs or {}))
