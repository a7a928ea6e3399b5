"""Bit-for-bit comparison of tensors, and detection of reads that make the host wait for a GPU."""

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits are equal: NaN equals itself, -0 differs from +0."""
    int_dtypes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(int_dtypes[a.element_size()]), b.contiguous().view(int_dtypes[b.element_size()])
    )  # fmt: skip


def flat_weights(model: nn.Module) -> torch.Tensor:
    """Concatenates all parameters into one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def fp32(*values: float) -> torch.Tensor:
    """Makes a float32 vector."""
    return torch.tensor(values, dtype=torch.float32)


def fp32_array(*values: float) -> np.ndarray:
    """Makes a float32 NumPy vector."""
    return np.array(values, dtype=np.float32)


class ForbidHostReads(TorchDispatchMode):
    """Raises ``AssertionError`` if the host reads a number from a tensor, for which it would wait on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host read a value"
        return func(*args, **(kwargs or {}))
