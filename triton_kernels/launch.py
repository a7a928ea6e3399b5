"""Launch configuration: pure functions from the size of the work to a frozen ``LaunchConfig``."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from .elements import ALIGN, BLOCK, ElementTable


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


def masked_config(warp_size: int) -> LaunchConfig:
    """Of every kernel here: ``ALIGN`` elements a thread, what one 16-byte load of offsets or of masters brings.

    Chosen from the compilers' output (triton 3.7.1), not yet by a clock. With 8 elements a thread, on
    sm_90 the fused update takes 124 registers and ``inner`` 143, which leaves 16 and 12 warps a multiprocessor to hide
    the latency of scattered stores; with 4 they take 66 and 80, for 24 warps, at 2% to 15% more instructions an
    element.
    """
    return LaunchConfig(block=BLOCK, num_warps=BLOCK // ALIGN // warp_size)


def config_of(kernel: Any) -> LaunchConfig:
    """The configuration of a kernel on the current device."""
    if not isinstance(kernel, JITFunction):  # Triton's interpreter, which has no warps
        return masked_config(32)
    driver = triton.runtime.driver.active
    return masked_config(_warp_size(driver, driver.get_current_device()))


@functools.cache
def _warp_size(driver: Any, device: int) -> int:
    return int(driver.get_current_target().warp_size)  # too slow to ask at every launch


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
            **config_of(kernel).options(),
        )


__all__ = ["LaunchConfig", "config_of", "launch_masked", "masked_config", "on_device_of"]
