"""What the compilers make of the kernels, without a GPU: ``python -m meerkat_engine.bench.codegen``.

Every launcher is called as the engine calls it, under a driver that names a GPU target and compiles but does not
launch. So the types, specializations and options examined here are those of a real launch.

For each kernel, target and weight dtype: registers, spills, local memory (NVIDIA: ptxas; AMD: the assembler's own
notes), and fused multiply-adds, of which the arithmetic of the stream allows none but those that a square root or a
division consists of.
"""

import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ..triton_kernels import build_table
from ..triton_kernels.coefficients import coefficients
from ..triton_kernels.inner import inner
from ..triton_kernels.launch import masked_config
from ..triton_kernels.normal import bits, normal
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
    """Stands in for the GPU driver: it names a target and has no device behind it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        # Triton caches compiled kernels by device number: a number of its own for each target.
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[Any]]:
    """Within this context a launch compiles for the target and does nothing; yields the list of what was compiled.

    Raises:
        RuntimeError: under Triton's interpreter, which compiles nothing.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it and start a new process")
    compiled: list[Any] = []
    run = JITFunction.run
    config = triton.runtime.driver
    before = config._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not seen for seen in compiled):
            compiled.append(kernel)
        return kernel

    config.set_active(_CompileOnlyDriver(target))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        config._active = before


@triton.jit
def _root_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.sqrt_rn(tl.load(x_ptr + at)))


@triton.jit
def _quotient_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr) / tl.load(y_ptr))


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """What one compilation came out as.

    Args:
        kernel: its name.
        target: sm_80, sm_90 or gfx942.
        dtype: of the live weights.
        dense: whether the kernel is the variant for tensors of which every element is masked.
        registers: per thread (NVIDIA registers, AMD vector registers).
        spills: instructions (NVIDIA) or registers (AMD) that spill.
        local_bytes: stack, local or scratch memory per thread.
        fused: fused multiply-adds that no correctly rounded square root or float64 division consists of.
        wide_loads: load instructions of 16 bytes a thread from global memory.
        wide_stores: store instructions of 16 bytes a thread to global memory.
        compilations: how many it took to serve all the seeds, scales and counts tried.
        arguments: name and type of what the compiled code takes at run time.
    """

    kernel: str
    target: str
    dtype: str
    dense: bool
    registers: int
    spills: int
    local_bytes: int
    fused: int
    wide_loads: int
    wide_stores: int
    compilations: int
    arguments: dict[str, str]


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no line like {pattern!r}")
    return int(found[1])


def _machine_code(kernel: Any) -> str:
    return str(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _cuobjdump(kernel.asm["cubin"], "-sass")


def _usage(kernel: Any, code: str) -> tuple[int, int, int]:
    """Registers, spills, bytes of local memory."""
    if "amdgcn" in kernel.asm:
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", code) + _number(r"\.sgpr_spill_count:\s+(\d+)", code)
        return _number(r"\.vgpr_count:\s+(\d+)", code), spills, _number(r"ScratchSize: (\d+)", code)
    usage = _cuobjdump(kernel.asm["cubin"], "-res-usage")
    local = _number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage)
    return _number(r"REG:(\d+)", usage), len(re.findall(r"\b(?:STL|LDL)\b", code)), local


def _fused(kernel: Any, code: str) -> int:
    """Fused multiply-adds in the machine code, and in the PTX, where the square root is still one instruction."""
    ptx = len(re.findall(r"\bfma\.", kernel.asm.get("ptx", "")))
    scalar = len(re.findall(r"\bFFMA\b|\bv_(?:fma|mad|fmac|mac|fmaak|fmamk|madak|madmk)_(?:mix_)?f(?:16|32)", code))
    return ptx + scalar + 2 * len(re.findall(r"\bv_pk_(?:fma|mad|fmac)_f32", code))


def _is_dense(kernel: Any) -> bool:
    names = kernel.src.fn.arg_names
    return "DENSE" in names and bool(kernel.src.constants[(names.index("DENSE"),)])


def _roots(kernel: Any) -> int:
    """Square roots a thread takes."""
    return len(re.findall(r"= (?:tail )?call .*sqrt", kernel.asm["llir"]))


def _quotients(kernel: Any) -> int:
    """float64 divisions a thread makes."""
    return len(re.findall(r"= (?:tail )?call double @llvm\.nvvm\.div|= fdiv double", kernel.asm["llir"]))


@functools.cache
def _expanded(target: str, roots: int, quotients: int) -> int:
    """Fused multiply-adds that correctly rounded square roots and float64 divisions consist of.

    Counted in kernels that do nothing but take so many square roots a thread, and one division.
    """
    config = masked_config(TARGETS[target].warp_size)
    n = roots * config.num_warps * TARGETS[target].warp_size
    with compiling_for(TARGETS[target]) as compiled:
        if roots:
            _root_kernel[(1,)](torch.zeros(n), torch.zeros(n), **config.options() | {"BLOCK": n})
        if quotients:
            double = torch.zeros(1, dtype=torch.float64)
            _quotient_kernel[(1,)](double, double.clone(), num_warps=1, enable_fp_fusion=False)
    if (sum(map(_roots, compiled)), sum(map(_quotients, compiled))) != (roots, quotients):
        raise RuntimeError(f"{target}: the calibration kernels do not take {roots} roots and {quotients} quotients")
    return sum(_fused(kernel, _machine_code(kernel)) for kernel in compiled)


def _launch_everything(dtype: torch.dtype) -> None:
    """Every launcher, over counts and lists of every size that a specializing compiler might tell apart."""
    for size in (5000, 16 * 1024):
        weight = torch.zeros(size, dtype=dtype)
        sparse = build_table([weight], [0], [torch.arange(0, size, 3)])
        for table in (sparse, build_table([weight], [0], None)):
            master = torch.zeros(table.slots)
            for steps in (1, 2, 16):
                seeds, c = torch.zeros(steps, dtype=torch.int64), torch.zeros(steps)
                perturb_(table, master, seeds[:1], c[:1])
                update_(table, master, seeds[:1], c[:1])
                update_perturb_(table, master, seeds[:1], c[:1], seeds[:1], c[:1])
                replay_(table, master, seeds, c)
                if table is sparse:
                    inner(master, table.ids(0, table.slots), seeds)
            restore_(table, master)
        for groups in (1, 2, 16):
            coefficients(torch.zeros(2), torch.zeros(1, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64))
        normal(0, sparse.ids(0, sparse.slots))
        bits(0, sparse.ids(0, sparse.slots))


def examine(target: str, dtype: str) -> list[KernelReport]:
    """Compiles every kernel for one target and weight dtype and reads what came out.

    Args:
        target: a key of ``TARGETS``.
        dtype: a key of ``DTYPES``.
    """
    with compiling_for(TARGETS[target]) as kernels:
        _launch_everything(DTYPES[dtype])
    variants = [(kernel.name, _is_dense(kernel)) for kernel in kernels]
    reports = []
    for kernel in kernels:
        code = _machine_code(kernel)
        registers, spills, local = _usage(kernel, code)
        reports.append(
            KernelReport(
                kernel=kernel.name,
                target=target,
                dtype=dtype,
                dense=_is_dense(kernel),
                registers=registers,
                spills=spills,
                local_bytes=local,
                fused=_fused(kernel, code) - _expanded(target, _roots(kernel), _quotients(kernel)),
                wide_loads=len(re.findall(r"\bLDG\.E\.128|(?:global|buffer)_load_dwordx4", code)),
                wide_stores=len(re.findall(r"\bSTG\.E\.128|(?:global|buffer)_store_dwordx4", code)),
                compilations=variants.count((kernel.name, _is_dense(kernel))),
                arguments={name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"},
            )
        )
    return reports


@click.command()
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the reports here.")
def main(path: Path | None) -> None:
    """Compiles every kernel for sm_80, sm_90 and gfx942 and prints what came out. Needs no GPU."""
    reports = [report for target in TARGETS for dtype in DTYPES for report in examine(target, dtype)]
    click.echo(f"{'kernel':<29} {'target':<7} {'dtype':<5} registers spills local fused 16-byte loads, stores")
    for r in reports:
        name = r.kernel + (", dense" if r.dense else "")
        click.echo(
            f"{name:<29} {r.target:<7} {r.dtype:<5} {r.registers:>9} {r.spills:>6} "
            f"{r.local_bytes:>5} {r.fused:>5} {r.wide_loads:>13} {r.wide_stores:>7}"
        )
    if path is not None:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        path.write_text(json.dumps({**versions, "kernels": [asdict(r) for r in reports]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
