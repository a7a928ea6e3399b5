"""What the compilers make of the kernels for three GPUs, with no GPU present."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TABLE = {"_perturb_kernel", "_update_kernel", "_update_perturb_kernel", "_replay_kernel", "_restore_kernel"}
LISTS = {"_normal_kernel", "_bits_kernel", "_inner_kernel", "_coefficients_kernel"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In a process of its own: this one has the interpreter switched on, which compiles nothing."""
    path: Path = tmp_path_factory.mktemp("codegen") / "codegen.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(path.parent / "cache")
    command = [sys.executable, "-m", "meerkat_engine.bench.codegen", "--json", str(path)]
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    kernels: list[dict[str, Any]] = json.loads(path.read_text())["kernels"]
    return kernels


def test_every_kernel_target_and_dtype_was_compiled(reports: list[dict[str, Any]]) -> None:
    found = {(r["kernel"], r["dense"], r["target"], r["dtype"]) for r in reports}
    targets, dtypes = ("sm_80", "sm_90", "gfx942"), ("fp32", "bf16", "fp16")
    variants = {(k, dense) for k in TABLE for dense in (False, True)} | {(k, False) for k in LISTS}
    assert found == {(*variant, t, d) for variant in variants for t in targets for d in dtypes}


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


def test_neighbours_are_loaded_and_stored_sixteen_bytes_at_a_time(reports: list[dict[str, Any]]) -> None:
    """Masters and offsets: four elements a thread; the weights too where a tensor is dense and fp32."""
    for r in reports:
        if r["kernel"] in TABLE:
            assert r["wide_loads"] == (1 if r["dense"] else 2), r
            stores = (r["kernel"] not in ("_perturb_kernel", "_restore_kernel")) + (r["dense"] and r["dtype"] == "fp32")
            assert r["wide_stores"] == stores, r


def test_fusion_is_seen_when_it_is_there() -> None:
    """The check above can fail: with fusion switched on, the same kernels do fuse."""
    script = (
        "from meerkat_engine.triton_kernels.launch import LaunchConfig\n"
        "options = LaunchConfig.options\n"
        "LaunchConfig.options = lambda self: options(self) | {'enable_fp_fusion': True}\n"
        "from meerkat_engine.bench.codegen import examine\n"
        "found = [r for t in ('sm_90', 'gfx942') for r in examine(t, 'fp32')]\n"
        "print([r.fused for r in found if r.kernel == '_update_kernel' and not r.dense])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    nvidia, amd = json.loads(out.stdout)
    assert nvidia > 50
    assert amd > 50
