"""The masked kernels, compared bit for bit with their plain-torch twins, and with their formulas."""

import functools
import math
import operator
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_engine.engine.backend import resolve
from meerkat_engine.triton_kernels import (
    BLOCK,
    ElementTable,
    Layout,
    block,
    build_table,
    coefficients,
    compare,
    inner,
    perturb,
    reference,
    replay,
    restore,
    update,
)
from meerkat_engine.triton_kernels.reference import seed_tensor

from helpers.tensors import fp32, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
KERNELS = SimpleNamespace(
    coefficients=coefficients.coefficients,
    compare=compare.compare,
    inner=inner.inner,
    perturb_=perturb.perturb_,
    replay_=replay.replay_,
    restore_=restore.restore_,
    update_=update.update_,
    update_perturb_=update.update_perturb_,
)


def bits64(*seeds: int) -> torch.Tensor:
    return torch.cat([seed_tensor(seed, CPU) for seed in seeds])


def weights_of(shapes: list[int], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator) * 0.05).to(dtype) for n in shapes]


def layout(name: str, n: int) -> torch.Tensor:
    choices: dict[str, Callable[[], torch.Tensor]] = {
        "all": lambda: torch.arange(n),
        "first": lambda: torch.tensor([0]),
        "last": lambda: torch.tensor([n - 1]),
        "sparse": lambda: torch.arange(0, n, 7),
    }
    return choices[name]()


def masters_of(table: ElementTable) -> torch.Tensor:
    """Makes masters that differ from the rounded weights, as after some updates."""
    master = torch.full((table.slots,), float("nan"))  # stays in slots without an element
    for tensor, low, high in table.tensor_slices(0, table.slots):
        at = table.offsets[low:high].long() if table.layout is Layout.SCATTERED else slice(None)
        master[low:high] = table.weights[tensor][at].float() + 1e-5
    return master


def elements_of(table: ElementTable, slots: torch.Tensor) -> torch.Tensor:
    return torch.cat([slots[low:high] for _, low, high in table.tensor_slices(0, table.slots)])


def run(
    ops: object,
    weights: list[torch.Tensor],
    bases: list[int],
    offsets: list[torch.Tensor] | None,
    *,
    compact: bool = False,
) -> list[torch.Tensor]:
    """Runs all operations in sequence; returns the weights after each, then the masters."""
    live = [w.clone() for w in weights]
    table = build_table(live, bases, offsets, compact=compact)
    master = masters_of(table)
    seen = []
    ops.perturb_(table, master, bits64(2**63 + 5), fp32(1e-3))  # type: ignore[attr-defined]
    seen += [w.clone() for w in live]
    ops.perturb_(table, master, bits64(2**63 + 5), fp32(-1e-3))  # type: ignore[attr-defined]
    seen += [w.clone() for w in live]
    ops.update_(table, master, bits64(7), fp32(0.0371))  # type: ignore[attr-defined]
    seen += [w.clone() for w in live]
    ops.perturb_(table, master, bits64(1), fp32(0.5))  # type: ignore[attr-defined]
    ops.restore_(table, master)  # type: ignore[attr-defined]
    return [*seen, *live, elements_of(table, master)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", ["all", "first", "last", "sparse"])
@pytest.mark.parametrize("sizes", [[1], [63], [1000], [BLOCK, BLOCK + 1, 3], [5, 4096, 1]], ids=str)
def test_kernels_match_the_reference(sizes: list[int], elements: str, dtype: torch.dtype) -> None:
    weights = weights_of(sizes, dtype)
    bases = [2**32 - 3 + sum(sizes[:i]) for i in range(len(sizes))]  # across the 32-bit boundary
    offsets = [layout(elements, n) for n in sizes]
    for a, b in zip(run(KERNELS, weights, bases, offsets), run(reference, weights, bases, offsets), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [[4], [1000], [BLOCK, BLOCK + 4, 8], [4096, 2000]], ids=str)
def test_fully_masked_tensors_need_no_offsets(sizes: list[int], dtype: torch.dtype) -> None:
    """Dense tables use four normals of each Philox block and give the same bits as tables with offsets."""
    weights = weights_of(sizes, dtype)
    bases = [2**32 - 8 + sum(sizes[:i]) for i in range(len(sizes))]
    offsets = [torch.arange(n) for n in sizes]
    runs = [run(ops, weights, bases, at) for ops in (KERNELS, reference) for at in (None, offsets)]
    for found in zip(*runs, strict=True):
        assert all(same_bits(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", ["all", "first", "last", "sparse"])
@pytest.mark.parametrize("sizes", [[1], [1000], [5, 4096, 1], [8 * BLOCK, 7]], ids=str)
def test_masked_elements_beside_their_tensors_have_the_same_bits(
    sizes: list[int], elements: str, dtype: torch.dtype
) -> None:
    weights = weights_of(sizes, dtype)
    bases = [2**32 - 3 + sum(sizes[:i]) for i in range(len(sizes))]
    offsets = [layout(elements, n) for n in sizes]
    beside = [w[at] for w, at in zip(weights, offsets, strict=True)]
    tensors = len(sizes)
    expected = run(reference, weights, bases, offsets)
    numba = resolve("numba", torch.device("cpu"))
    for ops in (KERNELS, reference, numba):
        found = run(ops, beside, bases, offsets, compact=True)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert same_bits(a, b if i == len(found) - 1 else b[offsets[i % tensors]])


def test_compact_weights_have_one_element_for_each_offset() -> None:
    with pytest.raises(ValueError, match="one element for each offset"):
        build_table([torch.zeros(8)], [0], [torch.tensor([1, 5])], compact=True)


@pytest.mark.parametrize(("base", "size", "shift"), [(2, 8, 0), (4, 7, 0), (4, 8, 1)], ids=["id", "size", "address"])
def test_tensors_that_are_not_aligned_need_offsets(base: int, size: int, shift: int) -> None:
    weight = torch.zeros(16)[shift : shift + size]
    with pytest.raises(ValueError, match="need offsets"):
        build_table([weight], [base], None)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("ops", [KERNELS, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_operations_have_the_bits_of_single_ones(dtype: torch.dtype, ops: object, dense: bool) -> None:
    sizes, steps = [2000, BLOCK + 4], [(2**63 + 5, 0.03), (2**64 - 1, -0.5), (3, 1e-7)]
    ends = []
    for fused in (True, False):
        live = weights_of(sizes, dtype)
        table = build_table(live, [0, 2**33], None if dense else [torch.arange(0, n, 3) for n in sizes])
        master = masters_of(table)
        if fused:
            ops.replay_(table, master, bits64(*[s for s, _ in steps]), fp32(*[c for _, c in steps]))  # type: ignore[attr-defined]
            seen = [w.clone() for w in live]
            ops.update_perturb_(table, master, bits64(8), fp32(0.1), bits64(9), fp32(0.2))  # type: ignore[attr-defined]
        else:
            for seed, c in steps:
                reference.update_(table, master, bits64(seed), fp32(c))
            seen = [w.clone() for w in live]
            reference.update_(table, master, bits64(8), fp32(0.1))
            reference.perturb_(table, master, bits64(9), fp32(0.2))
        ends.append([*seen, *live, elements_of(table, master)])
    assert all(same_bits(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter casts with numpy, which warns about overflow
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("ops", [KERNELS, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_something_else_wrote_are_counted(dtype: torch.dtype, ops: object, dense: bool) -> None:
    live = weights_of([2000, BLOCK + 4], dtype)
    table = build_table(live, [0, 2**33], None if dense else [torch.arange(0, w.numel(), 3) for w in live])
    master, counts = masters_of(table), torch.zeros(2, dtype=torch.int64)
    reference.restore_(table, master)
    ops.compare(table, master, counts)  # type: ignore[attr-defined]
    assert counts.tolist() == [0, 0]
    live[0][0] += 1
    live[0][3] = float("nan")
    live[0][1] += 1  # masked only in a dense table
    live[1][-1] = float("inf")
    master[2] = float("nan")
    if not dense:
        live[0][6] = float("nan")  # as the master is now, so this is no difference
    master[4] = 1e30  # infinite in float16
    ops.compare(table, master, counts)  # type: ignore[attr-defined]
    last = int(dense or (BLOCK + 3) % 3 == 0)
    assert counts.tolist() == [2 + last + (2 if dense else 0) + 1, int(dtype == torch.float16)]


@pytest.mark.parametrize("ops", [KERNELS, reference], ids=["kernels", "reference"])
def test_updates_are_counted(ops: object) -> None:
    (live,) = weights_of([100], torch.float32)
    table = build_table([live], [0], None)
    master, applied = masters_of(table), torch.zeros(1, dtype=torch.int32)
    ops.update_(table, master, bits64(1), fp32(0.5), applied=applied)  # type: ignore[attr-defined]
    ops.update_(table, master, bits64(1), fp32(math.nan), applied=applied, number=1)  # type: ignore[attr-defined]
    ops.replay_(table, master, bits64(1, 2, 3), fp32(1, 2, 3), applied=applied, number=2)  # type: ignore[attr-defined]
    ops.update_perturb_(  # type: ignore[attr-defined]
        table, master, bits64(1), fp32(0.5), bits64(2), fp32(0.1), applied=applied, number=5
    )
    assert applied.tolist() == [6]


def test_an_update_that_a_window_has_is_not_applied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interrupt in the second of four windows, the same call completes the update."""
    monkeypatch.setattr(reference, "_WINDOW", 32)
    ends = []
    for interrupted in (False, True):
        (live,) = weights_of([128], torch.bfloat16)
        table = build_table([live], [0], None)
        master, applied = masters_of(table), torch.zeros(4, dtype=torch.int32)
        for stop in [1, 4] if interrupted else [4]:
            windows = list(reference.windows(table))[:stop]
            with monkeypatch.context() as patch:
                patch.setattr(reference, "windows", lambda _, windows=windows: iter(windows))
                reference.replay_(table, master, bits64(1, 2), fp32(0.5, -0.25), applied=applied)
        assert applied.tolist() == [2] * 4
        ends.append((live, master))
    assert all(same_bits(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("ops", [KERNELS, reference], ids=["kernels", "reference"])
def test_replaying_nothing_changes_nothing(ops: object) -> None:
    (live,) = weights_of([100], torch.float32)
    table = build_table([live], [0], [torch.arange(0, 100, 3)])
    before, master = live.clone(), live[::3].clone()
    master = torch.cat([master, torch.zeros(table.slots - master.numel())])
    ops.replay_(table, master, bits64(1)[:0], fp32())  # type: ignore[attr-defined]
    assert same_bits(live, before)


@pytest.mark.parametrize("k", [0, 1, 5, BLOCK, 3 * BLOCK + 1], ids=str)
def test_inner_products_match_the_reference_and_the_formula(k: int, generator: torch.Generator) -> None:
    gradient, ids = torch.randn(k, generator=generator), torch.arange(k) * 5 + 2**32 - 7
    seeds = [0, 2**63 + 1, 2**64 - 1]
    found = [ops.inner(gradient, ids, bits64(*seeds)) for ops in (KERNELS, reference)]
    assert same_bits(*found)
    assert found[0].shape == (len(seeds), 2)
    for row, seed in zip(found[0], seeds, strict=True):
        z = reference.normal(seed, ids).double()
        wanted = [float((gradient.double() * z).sum()), float((z * z).sum())]
        assert row.tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("ops", [KERNELS, reference], ids=["kernels", "reference"])
def test_inner_products_of_no_seeds_are_empty(ops: object) -> None:
    assert ops.inner(torch.ones(5), torch.arange(5), bits64(1)[:0]).shape == (0, 2)  # type: ignore[attr-defined]


def test_inner_products_keep_their_bits() -> None:
    """The values were recorded before ``<z, z>`` was added; the second is ``<gradient, z>`` with z as the gradient."""
    (found,) = reference.inner(torch.arange(1000) / 7, torch.arange(1000) * 3, bits64(11)).tolist()
    assert [x.hex() for x in found] == ["0x1.4ffa56fa09eb0p+11", "0x1.fba7db876b0e7p+9"]


def fp64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns about overflow
@settings(max_examples=50, deadline=None)
@given(
    losses=st.tuples(*[st.floats(width=32)] * 2),
    eps=st.floats(1e-8, 1.0),
    lr=st.lists(st.floats(0, 1e3), min_size=1, max_size=3),
)
def test_coefficients_match_the_reference_for_any_losses(
    losses: tuple[float, float], eps: float, lr: list[float]
) -> None:
    found = [ops.coefficients(fp32(*losses), fp64(eps), fp64(*lr)) for ops in (KERNELS, reference)]
    assert [x.isnan().tolist() for x in found] == [found[0].isnan().tolist()] * 2  # a NaN has no sign to compare
    assert same_bits(*(x.nan_to_num(0.5) for x in found))


@given(losses=st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=9))
def test_half_a_deviation_has_the_bits_of_python_floats(losses: list[float]) -> None:
    mean = functools.reduce(operator.add, losses) / len(losses)
    square = functools.reduce(operator.add, [(loss - mean) * (loss - mean) for loss in losses])
    wanted = np.float32(math.sqrt(np.float32(square / (len(losses) - 1)))) * 0.5
    assert reference.half_deviation(fp32(*losses)).item() == (wanted or math.inf)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3e38])
def test_half_a_deviation_of_losses_that_are_too_large_is_nan(bad: float) -> None:
    assert math.isnan(reference.half_deviation(fp32(0.5, bad, 0.25)).item())


@pytest.mark.parametrize("ops", [KERNELS, reference], ids=["kernels", "reference"])
def test_the_projected_gradient_is_rounded_once(ops: object) -> None:
    plus, minus, eps = 0.7637010216712952, 0.18783339858055115, 1e-3  # found by search
    assert (fp32(plus) - fp32(minus)).item() != plus - minus
    loss, g, *c = ops.coefficients(fp32(plus, minus), fp64(eps), fp64(0.1, 3e-5))  # type: ignore[attr-defined]
    wanted = fp32((plus - minus) / (2 * eps))[0]
    assert torch.equal(g, wanted)
    assert not torch.equal(g, fp32((fp32(plus) - fp32(minus)).item() / (2 * eps))[0])
    assert loss.item() == fp32((plus + minus) / 2).item()
    assert [x.item() for x in c] == fp32(0.1 * wanted.item(), 3e-5 * wanted.item()).tolist()


@pytest.mark.parametrize("c", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ops", [KERNELS, reference], ids=["kernels", "reference"])
def test_an_update_with_a_non_finite_coefficient_is_skipped(ops: object, c: float) -> None:
    live = -torch.zeros(64)  # subtracting even 0 * z would change these signs
    before = live.clone()
    table = build_table([live], [0], None)
    master = live.clone()
    ops.update_(table, master, bits64(1), fp32(c))  # type: ignore[attr-defined]
    assert same_bits(live, before)
    ops.replay_(table, master, bits64(1, 2), fp32(c, 0.5))  # type: ignore[attr-defined]
    after = before - reference.normal(2, torch.arange(64)) * 0.5
    assert same_bits(live, after)
    ops.update_perturb_(table, master, bits64(1), fp32(c), bits64(3), fp32(0.25))  # type: ignore[attr-defined]
    assert same_bits(live, after + reference.normal(3, torch.arange(64)) * 0.25)
    assert same_bits(master, after)


def test_the_tree_adds_neighbours() -> None:
    big = torch.tensor([1.0, 1e16, -1e16, 3.0, 5.0], dtype=torch.float64)
    assert reference.tree_sum(big).item() == ((1.0 + 1e16) + (-1e16 + 3.0)) + 5.0
    assert math.copysign(1.0, reference.tree_sum(-torch.zeros(4)).item()) == 1.0


def test_a_launch_reads_its_values_when_it_runs() -> None:
    """Seed and scale are read from memory, as a captured graph needs: same tensors, other values."""
    (live,) = weights_of([64], torch.float32)
    table = build_table([live], [0], None)
    seed, scale, master = bits64(1), fp32(0.5), live.clone()
    KERNELS.perturb_(table, master, seed, scale)
    first = live.clone()
    seed.fill_(2)
    KERNELS.perturb_(table, master, seed, scale)
    assert not torch.equal(live, first)
    assert same_bits(live, master + reference.normal(2, torch.arange(64)) * 0.5)


@pytest.mark.parametrize("ops", [KERNELS, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operations_are_their_formulas(dtype: torch.dtype, ops: object) -> None:
    weights, offsets = weights_of([3000], dtype), [torch.arange(0, 3000, 3)]
    z = reference.normal(2**63 + 5, offsets[0] + 100)
    plus, minus, updated, restored, master = run(ops, weights, [100], offsets)
    before = weights[0][::3].float() + 1e-5
    assert same_bits(plus[::3], (before + z * torch.tensor(1e-3)).to(dtype))
    assert same_bits(minus[::3], (before + z * torch.tensor(-1e-3)).to(dtype))
    after = before - reference.normal(7, offsets[0] + 100) * torch.tensor(0.0371)
    assert same_bits(master, after)
    assert same_bits(updated[::3], after.to(dtype))
    assert same_bits(restored, updated)


@pytest.mark.parametrize("ops", [KERNELS, reference], ids=["kernels", "reference"])
def test_nothing_outside_the_mask_is_written(ops: object) -> None:
    guarded = torch.full((4096,), 7.0)
    weight = guarded[1024:3072]
    offsets = torch.arange(1, 2048, 5)
    table = build_table([weight], [0], [offsets])
    ops.perturb_(table, torch.zeros(table.slots), bits64(3), fp32(1.0))  # type: ignore[attr-defined]
    touched = torch.zeros(4096, dtype=torch.bool)
    touched[1024 + offsets] = True
    assert torch.equal(guarded != 7.0, touched)


def test_masks_nest_and_sparse_is_dense_on_the_mask() -> None:
    n = 5000
    dense_weight, sparse_weight = torch.zeros(n), torch.zeros(n)
    some = torch.arange(0, n, 11)
    for weight, offsets in ((dense_weight, None), (sparse_weight, [some])):
        table = build_table([weight], [40], offsets)
        KERNELS.perturb_(table, torch.zeros(table.slots), bits64(8), fp32(1.0))
    assert same_bits(sparse_weight[some], dense_weight[some])
    assert sparse_weight.count_nonzero() == some.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restore_is_exact_after_many_cycles(dtype: torch.dtype) -> None:
    (weight,) = weights_of([2000], dtype)
    before, offsets = weight.clone(), torch.arange(0, 2000, 2)
    table = build_table([weight], [0], [offsets])
    master = weight[offsets].float()
    for seed in range(1000):
        reference.perturb_(table, master, bits64(seed), fp32(1e-3))
        reference.perturb_(table, master, bits64(seed), fp32(-1e-3))
        reference.restore_(table, master)
    assert same_bits(weight, before)


@triton.jit
def _round_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, block.round_to(tl.load(x_ptr + at), y_ptr.dtype.element_ty))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy, on the way to an infinite float16
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_equals_torch_for_all_kinds_of_numbers(dtype: torch.dtype, generator: torch.Generator) -> None:
    upper = torch.arange(2**16) << 16  # every bfloat16, and around the ties between it and the next
    patterns = [upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    patterns.append(torch.randint(0, 2**32, (2**16,), generator=generator))
    patterns.append(torch.arange(2**16) << 13)  # every float16 pattern's neighbourhood
    x = torch.cat(patterns).to(torch.int32).view(torch.float32)
    finite = x[~x.isnan()]
    x = torch.cat([finite, torch.zeros(-finite.numel() % 4096)])
    y, nan = torch.empty_like(x, dtype=dtype), torch.empty(4096, dtype=dtype)
    _round_kernel[(x.numel() // 4096,)](x, y, BLOCK=4096)
    _round_kernel[(1,)](torch.full((4096,), float("nan")), nan, BLOCK=4096)
    assert same_bits(y, x.to(dtype))
    assert nan.isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    share=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**64 - 1),
    scale=st.floats(-1, 1, width=32),
)
def test_kernels_match_the_reference_for_any_layout_and_scale(
    counts: list[int], share: float, seed: int, scale: float
) -> None:
    weights = weights_of(counts, torch.bfloat16)
    offsets = [torch.arange(0, n, max(1, round(1 / share))) for n in counts]
    bases = [sum(counts[:i]) for i in range(len(counts))]
    live = [[w.clone() for w in weights] for _ in range(2)]
    for ops, mine in zip((KERNELS, reference), live, strict=True):
        table = build_table(mine, bases, offsets)
        ops.perturb_(table, masters_of(table), bits64(seed), fp32(scale))  # type: ignore[attr-defined]
    assert all(same_bits(a, b) for a, b in zip(*live, strict=True))


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_bits_do_not_depend_on_windows_and_chunks(monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    weights = weights_of([700, 900, 8], torch.float32)
    offsets = None if dense else [torch.arange(0, n, 2) for n in (700, 900, 8)]
    expected = run(reference, weights, [0, 700, 1600], offsets)
    monkeypatch.setattr(reference, "_WINDOW", 96)
    monkeypatch.setattr(reference, "_CHUNK", 12)
    assert all(same_bits(a, b) for a, b in zip(run(reference, weights, [0, 700, 1600], offsets), expected, strict=True))


def test_blocks_never_span_two_tensors() -> None:
    sizes = [BLOCK + 5, 3, 2 * BLOCK]
    table = build_table([torch.zeros(n) for n in sizes], [0, 10**10, 2 * 10**10], [torch.arange(n) for n in sizes])
    covered = []
    for address, base, start, count in table.blocks.tolist():
        ((tensor, low, high),) = table.tensor_slices(start, start + count)
        assert (address, base, low, high) == (
            table.weights[tensor].data_ptr(), table.bases[tensor], start, start + count
        )  # fmt: skip
        assert start % 4 == 0
        assert 0 < count <= BLOCK
        covered += range(start, start + count)
    assert covered == [slot for _, low, high in table.tensor_slices(0, table.slots) for slot in range(low, high)]
    assert table.nnz == sum(sizes)


def test_ids_of_a_slot_range() -> None:
    table: ElementTable = build_table(
        [torch.zeros(50), torch.zeros(9)], [7, 2**40], [torch.tensor([0, 3, 49]), torch.tensor([8])]
    )
    assert table.ids(0, 8).tolist() == [7, 10, 56, 0, 2**40 + 8, 0, 0, 0]  # four slots each
    assert table.ids(2, 5).tolist() == [56, 0, 2**40 + 8]
    assert table.ids(1, 1).tolist() == []
    assert build_table([torch.zeros(8)], [2**40], None).ids(3, 6).tolist() == [2**40 + 3, 2**40 + 4, 2**40 + 5]


def test_mixed_dtypes_are_rejected() -> None:
    with pytest.raises(ValueError, match="one table needs one dtype and device"):
        build_table([torch.zeros(3), torch.zeros(3).half()], [0, 3], [torch.tensor([0])] * 2)


def test_transposed_weights_are_rejected() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        build_table([torch.zeros(3, 4).T], [0], [torch.tensor([0])])
