"""What the compilers make of the kernels, without a GPU: ``python -m meerkat_engine.bench.codegen``.

For each kernel, target and weight dtype: registers, spills, local memory, 16-byte accesses, instructions an element,
and fused multiply-adds, of which the arithmetic of the stream allows none but those that a square root or a division
consists of. ``bench/results/codegen.md`` is this command's output, and a test compares.
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import triton

from ..triton_kernels import ALIGN
from .assembly import Assembly
from .compiling import DTYPES, TARGETS, compiling_for, launch_everything, quotient, square_roots


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
        mix: instructions a thread by kind; a thread has ``ALIGN`` elements, a loop's body counts once.
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
    mix: dict[str, int]
    compilations: int
    arguments: dict[str, str]


def _is_dense(kernel: Any) -> bool:
    names = kernel.src.fn.arg_names
    return "DENSE" in names and bool(kernel.src.constants[(names.index("DENSE"),)])


@functools.cache
def _expanded(target: str, roots: int, quotients: int) -> int:
    """Fused multiply-adds that so many square roots a thread and divisions consist of."""
    found = 0
    if roots:
        alone = Assembly(square_roots(target, roots))
        if alone.square_roots() != roots:
            raise RuntimeError(f"{target}: {alone.square_roots()} square roots in the code of {roots}")
        found += alone.fused()
    return found + quotients * Assembly(quotient(target)).fused()


def examine(target: str, dtype: str) -> list[KernelReport]:
    """Compiles every kernel for one target and weight dtype and reads what came out.

    Args:
        target: a key of ``TARGETS``.
        dtype: a key of ``DTYPES``.
    """
    with compiling_for(TARGETS[target]) as kernels:
        launch_everything(DTYPES[dtype])
    variants = [(kernel.name, _is_dense(kernel)) for kernel in kernels]
    reports = []
    for kernel in kernels:
        assembly = Assembly(kernel)
        registers, spills, local = assembly.usage()
        reports.append(
            KernelReport(
                kernel=kernel.name,
                target=target,
                dtype=dtype,
                dense=_is_dense(kernel),
                registers=registers,
                spills=spills,
                local_bytes=local,
                fused=assembly.fused() - _expanded(target, assembly.square_roots(), assembly.quotients()),
                wide_loads=assembly.wide_loads(),
                wide_stores=assembly.wide_stores(),
                mix=assembly.mix(),
                compilations=variants.count((kernel.name, _is_dense(kernel))),
                arguments={name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"},
            )
        )
    return reports


_KINDS = ("float32", "integer", "convert", "special", "memory", "move", "uniform", "control", "float64")


def markdown(reports: list[KernelReport]) -> str:
    """The reports as a table, without the columns that are zero throughout."""
    columns = ["kernel", "target", "weights", "registers", "16-byte loads", "16-byte stores", "instructions an element"]
    lines = [
        f"triton {triton.__version__}, {len(reports)} compilations with {sum(r.spills for r in reports)} spills, "
        f"{sum(r.local_bytes for r in reports)} bytes of local memory and {sum(r.fused for r in reports)} fused "
        f"multiply-adds. Instructions an element: a thread's over its {ALIGN} elements, by kind; a loop's body "
        "(replay: an update, inner: a seed) counts once; `_coefficients_kernel` has one thread.",
        "",
        f"| {' | '.join([*columns, *_KINDS])} |",
        "|---" * 3 + "|--:" * (len(columns) - 3 + len(_KINDS)) + "|",
    ]
    for r in reports:
        name = f"`{r.kernel}`{', dense' if r.dense else ''}"
        share = 1 if r.kernel == "_coefficients_kernel" else ALIGN
        mix = [f"{r.mix[kind] / share:.4g}" for kind in _KINDS]
        cells = [
            name,
            r.target,
            r.dtype,
            r.registers,
            r.wide_loads,
            r.wide_stores,
            f"{sum(r.mix.values()) / share:.4g}",
        ]
        lines.append(f"| {' | '.join(map(str, [*cells, *mix]))} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--output", type=click.Path(file_okay=False, exists=True, path_type=Path),
              help="Also write codegen.json and codegen.md into this directory, over what is there.")  # fmt: skip
def main(output: Path | None) -> None:
    """Compiles every kernel for sm_80, sm_90 and gfx942 and prints what came out. Needs no GPU."""
    reports = [report for target in TARGETS for dtype in DTYPES for report in examine(target, dtype)]
    click.echo(markdown(reports))
    if output is not None:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        kernels = [asdict(r) for r in reports]
        (output / "codegen.json").write_text(json.dumps({**versions, "kernels": kernels}, indent=1) + "\n")
        (output / "codegen.md").write_text(markdown(reports))


if __name__ == "__main__":
    main()
