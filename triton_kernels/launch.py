"""Launch configuration: pure functions from the size of the work to a frozen ``LaunchConfig``."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from .elements import BLOCK, ElementTable, Layout

if knobs.runtime.interpret and triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    raise ImportError(
        f"the interpreter of triton {triton.__version__} fails with numpy {np.__version__}: install triton>=3.7 or "
        f"numpy<2.4, or unset TRITON_INTERPRET"
    )

# Pointers whose alignment a kernel must not be compiled for: the values are often slices of longer tensors, so a new
# alignment would start the compiler in the middle of a run. ``w_like_ptr`` only carries a type.
VALUES = (
    "w_like_ptr",
    "applied_ptr",
    "counts_ptr",
    "seed_ptr",
    "next_seed_ptr",
    "seeds_ptr",
    "scale_ptr",
    "c_ptr",
    "losses_ptr",
    "eps_ptr",
    "lr_ptr",
    "out_ptr",
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


# Elements per program and per thread, chosen from the compilers' output for sm_90 (triton 3.7.1, bfloat16), not from
# timings yet. Scattered, four elements a thread are one 16-byte load of offsets or masters. With eight, a fused update
# takes 124 registers instead of 57: 16 warps per multiprocessor are left to hide the latency of scattered stores.
_SCATTERED = (BLOCK, 4)
# Where all elements are masked, eight share the cost of addresses and counts: 74 instead of 85 instructions an element
# for perturb, in 32 registers.
_DENSE = (BLOCK, 8)
# Replay is bound by its instructions, so a tensor's last block should not be mostly empty: at density 0.001 a tensor of
# SmolLM2-135M has 500 masked elements on average. ``inner`` in one warp needs no barrier: 192 instead of 232
# instructions an element.
_OF_KERNEL = {"_replay_kernel": (256, 4), "_inner_kernel": (256, 8)}


def launch_config(kernel: str, warp_size: int, *, dense: bool = False) -> LaunchConfig:
    """Configuration of a kernel.

    Args:
        kernel: name of the kernel.
        warp_size: number of threads per warp of the device.
        dense: whether all elements of the tensors are masked.
    """
    block, per_thread = _DENSE if dense else _OF_KERNEL.get(kernel, _SCATTERED)
    return LaunchConfig(block=block, num_warps=max(1, block // per_thread // warp_size))


_forced: list[LaunchConfig] = []


@contextlib.contextmanager
def forced_config(config: LaunchConfig) -> Iterator[None]:
    """Context in which every kernel on elements is launched with this configuration, to compare configurations.

    Args:
        config: the configuration. Its block divides that of the element table.
    """
    _forced.append(config)
    try:
        yield
    finally:
        _forced.pop()


def config_of(kernel: Any, *, dense: bool = False) -> LaunchConfig:
    """Returns the configuration of a kernel on the current device."""
    if _forced:
        return _forced[-1]
    if not isinstance(kernel, JITFunction):  # Triton's interpreter has no warps
        return launch_config(kernel.fn.__name__, 32, dense=dense)
    driver = triton.runtime.driver.active
    return launch_config(kernel.fn.__name__, _warp_size(driver, driver.get_current_device()), dense=dense)


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
    dense = table.layout is Layout.DENSE
    with on_device_of(master):
        config = config_of(kernel, dense=dense)
        kernel[(table.blocks.shape[0] * (BLOCK // config.block),)](
            w_like_ptr=table.weights[0],
            blocks_ptr=table.blocks,
            offsets_ptr=master if dense else table.offsets,
            master_ptr=master,
            **arguments,
            LAYOUT=int(table.layout),
            **config.options(),
        )


__all__ = ["VALUES", "LaunchConfig", "config_of", "forced_config", "launch_config", "launch_masked", "on_device_of"]
