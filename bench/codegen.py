"""Reports on the machine code of the kernels, without a GPU: ``python -m meerkat_engine.bench.codegen``.

For each kernel, target and weight dtype it reports registers, spills, local memory, 16-byte accesses, instructions per
element and fused multiply-adds. The arithmetic of the stream allows no fused multiply-adds except those that implement
a square root or a division. ``bench/results/codegen.md`` is the output of this command; a test compares the two.
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import triton

from ..triton_kernels import Layout
from .assembly import Assembly
from .compiling import DTYPES, TARGETS, compiling_for, launch_everything, quotient, square_roots


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """Properties of one compiled kernel.

    Args:
        kernel: name of the kernel.
        target: sm_80, sm_90 or gfx942.
        dtype: dtype of the live weights: fp32, bf16 or fp16.
        layout: where the weights of its elements are, a name of ``Layout``; "" for kernels on lists.
        elements: elements per thread.
        warps: warps per program.
        registers: registers per thread (AMD: vector registers).
        spills: spilling instructions (NVIDIA) or spilled registers (AMD).
        local_bytes: stack, local or scratch memory per thread, in bytes.
        fused: fused multiply-adds outside of correctly rounded square roots and float64 divisions.
        wide_loads: 16-byte load instructions per thread from global memory.
        wide_stores: 16-byte store instructions per thread to global memory.
        mix: instructions per thread by kind; a loop body counts once.
        compilations: number of compilations of this variant for all tested seeds, scales and counts.
        arguments: names and types of the run-time arguments.
    """

    kernel: str
    target: str
    dtype: str
    layout: str
    elements: int
    warps: int
    registers: int
    spills: int
    local_bytes: int
    fused: int
    wide_loads: int
    wide_stores: int
    mix: dict[str, int]
    compilations: int
    arguments: dict[str, str]


def _constant(kernel: Any, name: str) -> int:
    """Returns the value of a compile-time argument; 0 if the kernel has none of this name."""
    names = kernel.src.fn.arg_names
    return int(kernel.src.constants[(names.index(name),)]) if name in names else 0


def _per_program(kernel: Any) -> int:
    """Returns the number of elements of a program; the correction's are outputs."""
    return _constant(kernel, "BLOCK") or _constant(kernel, "TOKENS") * _constant(kernel, "ROWS")


def _layout(kernel: Any) -> str:
    if "LAYOUT" not in kernel.src.fn.arg_names:
        return ""
    return Layout(_constant(kernel, "LAYOUT")).name.lower()


@functools.cache
def _expanded(target: str, roots: int, quotients: int) -> int:
    """Returns the fused multiply-adds that implement ``roots`` square roots and ``quotients`` divisions per thread."""
    fused = 0
    if roots:
        alone = Assembly(square_roots(target, roots))  # nothing but the square roots
        if alone.square_roots() != roots:
            raise RuntimeError(f"{target}: the code has {alone.square_roots()} square roots, expected {roots}")
        fused += alone.fused()
    return fused + quotients * Assembly(quotient(target)).fused()


def examine(target: str, dtype: str) -> list[KernelReport]:
    """Compiles every kernel for one target and weight dtype, and returns a report on each.

    Args:
        target: a key of ``TARGETS``.
        dtype: a key of ``DTYPES``.
    """
    with compiling_for(TARGETS[target]) as kernels:
        launch_everything(DTYPES[dtype])
    variants = [(kernel.name, _layout(kernel)) for kernel in kernels]
    reports = []
    for kernel in kernels:
        assembly = Assembly(kernel)
        registers, spills, local = assembly.usage()
        reports.append(
            KernelReport(
                kernel=kernel.name,
                target=target,
                dtype=dtype,
                layout=_layout(kernel),
                elements=max(1, _per_program(kernel) // (kernel.metadata.num_warps * TARGETS[target].warp_size)),
                warps=kernel.metadata.num_warps,
                registers=registers,
                spills=spills,
                local_bytes=local,
                fused=assembly.fused() - _expanded(target, assembly.square_roots(), assembly.quotients()),
                wide_loads=assembly.wide_loads(),
                wide_stores=assembly.wide_stores(),
                mix=assembly.mix(),
                compilations=variants.count((kernel.name, _layout(kernel))),
                arguments={name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"},
            )
        )
    return reports


_KINDS = ("float32", "integer", "convert", "special", "memory", "move", "uniform", "control", "float64")


def markdown(reports: list[KernelReport]) -> str:
    """Returns the reports as a Markdown table. Properties that should be zero are summed up in the heading."""
    columns = [
        "kernel",
        "target",
        "weights",
        "elements a thread",
        "warps",
        "registers",
        "16-byte loads",
        "16-byte stores",
        "instructions an element",
    ]
    lines = [
        f"triton {triton.__version__}, {len(reports)} compilations with {sum(r.spills for r in reports)} spills, "
        f"{sum(r.local_bytes for r in reports)} bytes of local memory and {sum(r.fused for r in reports)} fused "
        "multiply-adds. Instructions an element: a thread's over its elements, by kind; a loop's body (replay: an "
        "update, inner: a seed, correct: four masked elements a row) counts once; `_coefficients_kernel` has one "
        "thread.",
        "",
        f"| {' | '.join([*columns, *_KINDS])} |",
        "|---" * 3 + "|--:" * (len(columns) - 3 + len(_KINDS)) + "|",
    ]
    for r in reports:
        name = f"`{r.kernel}`{f', {r.layout}' if r.layout not in ('', 'scattered') else ''}"
        mix = [f"{r.mix[kind] / r.elements:.4g}" for kind in _KINDS]
        cells = [
            name,
            r.target,
            r.dtype,
            r.elements,
            r.warps,
            r.registers,
            r.wide_loads,
            r.wide_stores,
            f"{sum(r.mix.values()) / r.elements:.4g}",
        ]
        lines.append(f"| {' | '.join(map(str, [*cells, *mix]))} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--output", type=click.Path(file_okay=False, exists=True, path_type=Path),
              help="Also write codegen.json and codegen.md into this directory, overwriting them.")  # fmt: skip
def main(output: Path | None) -> None:
    """Compiles every kernel for sm_80, sm_90 and gfx942 and prints a report. Needs no GPU."""
    reports = [report for target in TARGETS for dtype in DTYPES for report in examine(target, dtype)]
    click.echo(markdown(reports))
    if output is not None:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        kernels = [asdict(r) for r in reports]
        (output / "codegen.json").write_text(json.dumps({**versions, "kernels": kernels}, indent=1) + "\n")
        (output / "codegen.md").write_text(markdown(reports))


if __name__ == "__main__":
    main()
