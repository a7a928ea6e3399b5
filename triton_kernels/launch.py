"""Launch configuration: pure functions from the size of the work to a frozen ``LaunchConfig``."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .elements import BLOCK, ElementTable


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a kernel is launched; none of it changes a result.

    Args:
        block: elements per program.
        num_warps: warps per program (a power of two).
    """

    block: int
    num_warps: int

    def options(self) -> dict[str, int | bool]:
        """Launch keywords. Fused multiply-add is off: the arithmetic rounds every operation."""
        return {"BLOCK": self.block, "num_warps": self.num_warps, "enable_fp_fusion": False}


# 8 elements a thread at 128 threads. Not tuned on a device yet: no GPU was at hand when it was written.
MASKED = LaunchConfig(block=BLOCK, num_warps=4)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU current: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def launch_masked(kernel: Any, table: ElementTable, master: Tensor, **arguments: Tensor | int) -> None:
    """Launches a kernel once over all elements of a table; ``arguments`` are the kernel's own.

    Seeds, scales and coefficients are tensors on the device: a captured launch reads what they hold when it runs.
    """
    with on_device_of(master):
        kernel[(table.blocks.shape[0],)](
            w_like_ptr=table.weights[0],
            blocks_ptr=table.blocks,
            offsets_ptr=master if table.offsets is None else table.offsets,
            master_ptr=master,
            **arguments,
            DENSE=table.offsets is None,
            **MASKED.options(),
        )


__all__ = ["MASKED", "LaunchConfig", "launch_masked", "on_device_of"]
