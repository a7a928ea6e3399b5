"""Launch configuration: what a launch is compiled for, and versions that cannot work."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import triton

from meerkat_engine.triton_kernels import BLOCK, Layout, build_table, perturb, reference, replay, update
from meerkat_engine.triton_kernels.inner import inner
from meerkat_engine.triton_kernels.launch import LaunchConfig, forced_config, launch_config

from helpers.imports import ROOT
from helpers.processes import run_python
from helpers.tensors import same_bits

# Runs every launcher for a GPU, and prints what the compiler would be called for, without calling it.
COMPILED = """
import json, torch
from triton.runtime.jit import JITFunction
from meerkat_engine.bench.compiling import TARGETS, compiling_for, launch_everything
seen = set()
JITFunction._do_compile = lambda self, key, *_: seen.add((self.__name__, key))
with compiling_for(TARGETS["sm_90"]):
    launch_everything(torch.bfloat16)
print(json.dumps(sorted(seen)))
"""


def test_a_slice_of_seeds_or_scales_starts_no_compiler() -> None:
    """Each kernel is compiled once, and the masked ones once for each layout of a table."""
    names = [name for name, _ in json.loads(run_python("-c", COMPILED))]
    masked = {name for name in names if names.count(name) == len(Layout)}
    once = {name for name in names if names.count(name) == 1}
    assert masked == {
        f"_{name}_kernel" for name in ("perturb", "update", "update_perturb", "replay", "restore", "compare")
    }
    assert once == {f"_{name}_kernel" for name in ("inner", "normal", "bits", "polar", "coefficients", "correct")}


def load_again() -> None:
    """Executes the module ``launch`` once more, under another name."""
    path = Path(ROOT, "triton_kernels", "launch.py")
    spec = importlib.util.spec_from_file_location("meerkat_engine.triton_kernels.launch_again", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(("of_triton", "of_numpy"), [("3.6.0", "2.3.5"), ("3.7.0", "2.5.0")])
def test_the_interpreter_of_triton_36_is_refused_with_a_newer_numpy(
    monkeypatch: pytest.MonkeyPatch, of_triton: str, of_numpy: str
) -> None:
    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(np, "__version__", of_numpy)
    load_again()
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(np, "__version__", "2.4.0")
    with pytest.raises(ImportError, match=r"the interpreter of triton 3\.6\.0 fails with numpy 2\.4\.0: install"):
        load_again()


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_every_block_divides_that_of_the_table(warp_size: int, dense: bool) -> None:
    for kernel in ("_perturb_kernel", "_replay_kernel", "_inner_kernel"):
        config = launch_config(kernel, warp_size, dense=dense)
        assert BLOCK % config.block == 0
        assert config.block % (config.num_warps * warp_size) == 0


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("block", [64, 256, BLOCK])
def test_bits_do_not_depend_on_the_block_of_a_program(block: int, dense: bool) -> None:
    sizes = [BLOCK + 8, 300]
    seeds, c = torch.tensor([5, 2**40, -3]), torch.tensor([0.5, float("nan"), -0.25])
    ends = []
    for ops in ((replay.replay_, update.update_perturb_, perturb.perturb_, inner), (
        reference.replay_, reference.update_perturb_, reference.perturb_, reference.inner
    )):  # fmt: skip
        live = [torch.linspace(-1, 1, n, dtype=torch.float32).bfloat16() for n in sizes]
        table = build_table(live, [8, 2**33], None if dense else [torch.arange(0, n, 3) for n in sizes])
        master = torch.linspace(-1, 1, table.slots)
        with forced_config(LaunchConfig(block=block, num_warps=1)):
            ops[0](table, master, seeds, c)
            seen = [torch.cat(live)]
            ops[1](table, master, seeds[:1], c[:1], seeds[2:], c[2:])
            seen.append(torch.cat(live))
            ops[2](table, master, seeds[1:2], c[:1])
            products = ops[3](master, table.ids(0, table.slots), seeds)
        masters = torch.cat([master[low:high] for _, low, high in table.tensor_slices(0, table.slots)])
        ends.append([*seen, torch.cat(live), masters, products])
    assert all(same_bits(a, b) for a, b in zip(*ends, strict=True))


def test_a_program_without_elements_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay of 10,000 updates would otherwise draw 10,000 times for the empty parts of every tensor's last block."""
    drawn, draw = [], replay.block_normals
    monkeypatch.setattr(replay, "block_normals", lambda *of: drawn.append(1) or draw(*of))
    table = build_table([torch.zeros(300)], [0], [torch.arange(0, 300, 100)])
    replay.replay_(table, torch.zeros(table.slots), torch.tensor([1, 2]), torch.ones(2))
    assert len(drawn) == 2


def test_inner_products_are_the_same_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient, ids, seeds = torch.linspace(-1, 1, 600), torch.arange(600) * 7, torch.tensor([4, 5, 6, 7, 8])
    monkeypatch.setattr("meerkat_engine.triton_kernels.inner._SUMS", 12)  # two seeds of three chunks
    assert same_bits(inner(gradient, ids, seeds), reference.inner(gradient, ids, seeds))
