"""Compiles the kernels for GPUs without a GPU.

Every launcher is called as the engine calls it, under a driver that names a GPU target and compiles without launching.
So the types, specializations and options of the compiled kernels are those of a real launch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ..triton_kernels import build_table
from ..triton_kernels.coefficients import coefficients
from ..triton_kernels.compare import compare
from ..triton_kernels.correction import correct_, correction_rows
from ..triton_kernels.inner import inner
from ..triton_kernels.launch import launch_config
from ..triton_kernels.normal import bits, normal, polar
from ..triton_kernels.perturb import perturb_
from ..triton_kernels.replay import replay_
from ..triton_kernels.restore import restore_
from ..triton_kernels.update import update_, update_perturb_

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _CompileOnlyDriver:
    """Replaces the GPU driver: it names a target and has no device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        # Triton caches compiled kernels by device number, so each target needs its own number.
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[Any]]:
    """Makes launches compile for a target without running; yields the list of compiled kernels.

    Args:
        target: the GPU target.

    Raises:
        RuntimeError: under Triton's interpreter, which compiles nothing.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it and start a new process")
    compiled: list[Any] = []
    run = JITFunction.run
    driver = triton.runtime.driver
    active_before = driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not other for other in compiled):
            compiled.append(kernel)
        return kernel

    driver.set_active(_CompileOnlyDriver(target))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active_before


@triton.jit
def _root_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.sqrt_rn(tl.load(x_ptr + at)))


@triton.jit
def _quotient_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr) / tl.load(y_ptr))


def _zeros(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype, device="cpu")


def launch_everything(dtype: torch.dtype) -> None:
    """Calls every launcher, with counts, lengths and alignments of every kind that the compiler could specialize on.

    Seeds, scales and coefficients are slices of longer tensors, as the engine passes them.

    Args:
        dtype: dtype of the live weights.
    """
    for size in (5000, 16 * 1024):
        weight = torch.zeros(size, dtype=dtype, device="cpu")
        sparse = build_table([weight], [0], [torch.arange(0, size, 3, device="cpu")])
        offsets = torch.arange(0, size, 3, device="cpu")
        compact = build_table([weight[: offsets.numel()]], [0], [offsets], compact=True)
        for table in (sparse, compact, build_table([weight], [0], None)):
            master, applied = _zeros(table.slots), _zeros(1, torch.int32)
            for steps, at in ((1, 0), (2, 1), (16, 3)):
                seeds, c = _zeros(at + steps, torch.int64)[at:], _zeros(at + steps)[at:]
                seed, other_seed = seeds[:1], seeds[-1:]
                perturb_(table, master, seed, c[:1])
                update_(table, master, seed, c[-1:], applied=applied)
                update_perturb_(table, master, seed, c[:1], other_seed, c[-1:], applied=applied)
                replay_(table, master, seeds, c, applied=applied)
                if table is sparse:
                    inner(master, table.ids(0, table.slots), seeds)
            restore_(table, master)
            for at in (0, 1):
                compare(table, master, _zeros(at + 2, torch.int64)[at:])
        for groups, at in ((1, 0), (2, 1), (16, 3)):
            doubles = _zeros(at + groups, torch.float64)[at:]
            coefficients(_zeros(at + 2)[at:], doubles[-1:], doubles)
        normal(0, sparse.ids(0, sparse.slots))
        bits(0, sparse.ids(0, sparse.slots))
        polar(sparse.ids(0, sparse.slots))
    for tokens, in_features, out_features, n, at in ((1, 64, 64, 5, 0), (16, 1000, 501, 16, 1), (5, 512, 2048, 300, 3)):
        elements = torch.arange(0, in_features * out_features, in_features * out_features // n, device="cpu")[:n]
        x, y = (_zeros(at + tokens * m, dtype)[at:].view(tokens, m) for m in (in_features, out_features))
        values, base = _zeros(at + n)[at:], _zeros(n)
        correct_(x, y, correction_rows(elements, in_features), values, base)


def square_roots(target: str, roots: int) -> Any:
    """Returns a compiled kernel that only computes ``roots`` correctly rounded square roots per thread.

    Args:
        target: a key of ``TARGETS``.
        roots: number of square roots per thread.
    """
    config = launch_config("_root_kernel", TARGETS[target].warp_size)
    n = roots * config.num_warps * TARGETS[target].warp_size
    with compiling_for(TARGETS[target]) as compiled:
        _root_kernel[(1,)](_zeros(n), _zeros(n), **config.options() | {"BLOCK": n})
    return compiled[0]


def quotient(target: str) -> Any:
    """Returns a compiled kernel that only computes one float64 division.

    Args:
        target: a key of ``TARGETS``.
    """
    double = _zeros(1, torch.float64)
    with compiling_for(TARGETS[target]) as compiled:
        _quotient_kernel[(1,)](double, double.clone(), num_warps=1, enable_fp_fusion=False)
    return compiled[0]


__all__ = ["DTYPES", "TARGETS", "compiling_for", "launch_everything", "quotient", "square_roots"]
