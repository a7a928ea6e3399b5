"""Tests of the machine code of the kernels for three GPUs. They need no GPU."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meerkat_engine.bench.assembly import Assembly
from meerkat_engine.triton_kernels import Layout

from helpers.processes import run_python

pytestmark = pytest.mark.slow  # compiles every kernel for three GPUs: run it after a change to a kernel
RESULTS = Path(__file__).parents[2] / "bench" / "results"
WRITING_KERNELS = {"_perturb_kernel", "_update_kernel", "_update_perturb_kernel", "_replay_kernel", "_restore_kernel"}
TABLE_KERNELS = WRITING_KERNELS | {"_compare_kernel"}
LIST_KERNELS = {
    "_normal_kernel", "_bits_kernel", "_polar_kernel", "_inner_kernel", "_coefficients_kernel", "_correct_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("codegen")
    cache = str(path / "cache")
    run_python("-m", "meerkat_engine.bench.codegen", "--output", str(path), TRITON_CACHE_DIR=cache)
    return path


@pytest.fixture(scope="module")
def reports(directory: Path) -> list[dict[str, Any]]:
    kernels: list[dict[str, Any]] = json.loads((directory / "codegen.json").read_text())["kernels"]
    return kernels


@pytest.mark.parametrize("name", ["codegen.json", "codegen.md"])
def test_the_recorded_table_matches_the_compilers_output(directory: Path, name: str) -> None:
    recorded, new = (json.loads((d / "codegen.json").read_text()) for d in (RESULTS, directory))
    if recorded["triton"] != new["triton"]:
        pytest.skip(f"recorded with triton {recorded['triton']}, installed is {new['triton']}")
    if name == "codegen.json":
        assert new["kernels"] == recorded["kernels"]
    else:
        assert (directory / name).read_text() == (RESULTS / name).read_text()


def test_every_instruction_has_a_kind(reports: list[dict[str, Any]]) -> None:
    assert [r for r in reports if r["mix"]["other"]] == []
    perturb = {(r["target"], r["layout"]): r["mix"] for r in reports if r["kernel"] == "_perturb_kernel"}
    for (target, layout), mix in perturb.items():
        # Scattered elements take one square root each, dense ones half of one. Memory: offsets, masters, weights.
        assert mix["special"] >= 4, target
        assert mix["memory"] >= 6, target
        assert mix["float64"] == 0
        # Four normals from one Philox block cost far less than one normal from each of four blocks.
        assert sum(mix.values()) < (80 * 8 if layout == "dense" else 210 * 4), target


def test_every_kernel_target_and_dtype_was_compiled(reports: list[dict[str, Any]]) -> None:
    reported = {(r["kernel"], r["layout"], r["target"], r["dtype"]) for r in reports}
    targets, dtypes = ("sm_80", "sm_90", "gfx942"), ("fp32", "bf16", "fp16")
    variants = {(k, layout.name.lower()) for k in TABLE_KERNELS for layout in Layout} | {(k, "") for k in LIST_KERNELS}
    assert reported == {(*variant, t, d) for variant in variants for t in targets for d in dtypes}


def test_no_spills_and_no_local_memory(reports: list[dict[str, Any]]) -> None:
    assert [r for r in reports if r["spills"] or r["local_bytes"]] == []
    assert all(0 < r["registers"] <= 128 for r in reports)


def test_no_fused_multiply_add_in_the_arithmetic(reports: list[dict[str, Any]]) -> None:
    assert [r for r in reports if r["fused"]] == []


def test_one_compilation_serves_every_seed_scale_and_count(reports: list[dict[str, Any]]) -> None:
    assert [r for r in reports if r["compilations"] != 1] == []
    for r in reports:
        if r["kernel"] == "_perturb_kernel":  # read from memory when the launch runs
            assert (r["arguments"]["seed_ptr"], r["arguments"]["scale_ptr"]) == ("*i64", "*fp32")


def test_contiguous_values_are_accessed_sixteen_bytes_at_a_time(reports: list[dict[str, Any]]) -> None:
    """Applies to masters and offsets, and to the weights of dense fp32 tensors."""
    for r in reports:
        runs = r["elements"] // 4  # four elements are 16 bytes
        wide_weights = r["layout"] == "dense" and r["dtype"] == "fp32"
        draws = r["kernel"] not in ("_restore_kernel", "_compare_kernel")  # if not, compact elements need no offsets
        loads = 2 if r["layout"] == "scattered" or (r["layout"] == "compact" and draws) else 1
        if r["kernel"] in WRITING_KERNELS:
            assert r["wide_loads"] == loads * runs, r
            stores = (r["kernel"] not in ("_perturb_kernel", "_restore_kernel")) + wide_weights
            assert r["wide_stores"] == stores * runs, r
        elif r["kernel"] in TABLE_KERNELS:  # reads the weights and writes two counts
            assert r["wide_loads"] == (loads + wide_weights) * runs, r
            assert r["wide_stores"] == 0, r


def test_fusion_is_detected_when_it_is_enabled() -> None:
    """Shows that the test above can fail: with fusion enabled, the same kernels have fused multiply-adds."""
    script = (
        "from meerkat_engine.triton_kernels.launch import LaunchConfig\n"
        "options = LaunchConfig.options\n"
        "LaunchConfig.options = lambda self: options(self) | {'enable_fp_fusion': True}\n"
        "from meerkat_engine.bench.codegen import examine\n"
        "reports = [r for t in ('sm_90', 'gfx942') for r in examine(t, 'fp32')]\n"
        "print([r.fused for r in reports if r.kernel == '_update_kernel' and r.layout == 'scattered'])\n"
    )
    nvidia, amd = json.loads(run_python("-c", script))
    assert nvidia > 50
    assert amd > 50


def test_operations_on_vectors_count_once_a_value() -> None:
    """Newer compilers combine the square roots of a thread into vectors."""
    code = (
        "  %1 = tail call float @llvm.sqrt.f32(float %0)\n  %2 = call <2 x float> @llvm.sqrt.v2f32(<2 x float> %9)\n"
        "  %3 = tail call <4 x float> @llvm.sqrt.v4f32(<4 x float> %8)\n  %4 = fdiv <2 x double> %5, %6\n"
        "  %7 = tail call double @llvm.nvvm.div.rn.d(double %5, double %6)\n  %8 = fdiv <2 x float> %1, %2\n"
        "declare float @llvm.amdgcn.rsq.f32(float) #0\n  %9 = tail call float @llvm.amdgcn.rsq.f32(float %3)\n"
    )
    assembly = Assembly(SimpleNamespace(asm={"llir": code}))
    assert (assembly.square_roots(), assembly.quotients()) == (8, 3)


@pytest.mark.parametrize(
    ("amd", "text", "mix"),
    [
        (
            False,
            "        /*0000*/                   LDC R1, c[0x0][0x28] ;\n        /*0010*/              @!P0 EXIT ;\n"
            "        /*0020*/                   IMAD.WIDE.U32 R4, R2, -0x2daee0ad, RZ ;\n"
            "        /*0030*/              @P1 FADD R3, R3, R5 ;\n        /*0040*/                   NOP;\n",
            {"memory": 1, "control": 1, "integer": 1, "float32": 1},
        ),
        (
            True,
            "kernel:\n\ts_load_dwordx2 s[0:1], s[4:5], 0x0\n\tv_mad_u64_u32 v[2:3], s[0:1], v1, s2, 0\n"
            "\tv_pk_mul_f32 v[2:3], v[2:3], v[4:5]\n\tv_strange_thing v1\n\ts_endpgm\n\t.section\t.rodata\n"
            "\tv_not_code\n",
            {"memory": 1, "integer": 2, "float32": 1, "control": 1},
        ),
    ],
    ids=["nvidia", "amd"],
)
def test_instructions_are_counted_by_kind(amd: bool, text: str, mix: dict[str, int]) -> None:
    assembly = Assembly(SimpleNamespace(asm={"amdgcn": text} if amd else {}))
    assembly.text = text  # type: ignore[misc]
    assert {kind: count for kind, count in assembly.mix().items() if count} == mix
