"""Launch configuration: pure functions from the size of the work to a frozen ``LaunchConfig``."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from .elements import ALIGN, BLOCK, ElementTable

if knobs.runtime.interpret and triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    raise ImportError(
        f"the interpreter of triton {triton.__version__} fails with numpy {np.__version__}: install triton>=3.7 or "
        f"numpy<2.4, or unset TRITON_INTERPRET"
    )


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Launch parameters of a kernel. They do not change any result.

    Args:
        block: number of elements per program.
        num_warps: number of warps per program, a power of two.
    """

    block: int
    num_warps: int

    def options(self) -> dict[str, int | bool]:
        """Returns the launch keywords. Fused multiply-add is off, because the arithmetic rounds every operation."""
        return {"BLOCK": self.block, "num_warps": self.num_warps, "enable_fp_fusion": False}


def masked_config(warp_size: int) -> LaunchConfig:
    """Configuration of all masked kernels: ``ALIGN`` elements per thread, one 16-byte load of offsets or masters.

    It was chosen from the compilers' output (triton 3.7.1), not from timings yet. With 8 elements per thread on sm_90,
    the fused update takes 124 registers and ``inner`` 143. That leaves 16 and 12 warps per multiprocessor to hide the
    latency of scattered stores. With 4 elements per thread they take 57 and 80 registers, for 24 warps and more, at 2%
    to 15% more instructions per element.

    Args:
        warp_size: number of threads per warp of the device.
    """
    return LaunchConfig(block=BLOCK, num_warps=BLOCK // ALIGN // warp_size)


def config_of(kernel: Any) -> LaunchConfig:
    """Returns the configuration of a kernel on the current device."""
    if not isinstance(kernel, JITFunction):  # Triton's interpreter has no warps
        return masked_config(32)
    driver = triton.runtime.driver.active
    return masked_config(_warp_size(driver, driver.get_current_device()))


@functools.cache
def _warp_size(driver: Any, device: int) -> int:
    return int(driver.get_current_target().warp_size)  # cached: too slow to query at every launch


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context that makes the tensor's GPU the current device, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def launch_masked(kernel: Any, table: ElementTable, master: Tensor, **arguments: Tensor | int | None) -> None:
    """Launches a kernel once over all elements of a table.

    Seeds, scales and coefficients are tensors on the device, so a captured launch reads their values when it runs.

    Args:
        kernel: the Triton kernel.
        table: table of the masked elements.
        master: masters, float32 [slots].
        arguments: further keyword arguments of the kernel.
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
