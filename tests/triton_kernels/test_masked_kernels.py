"""perturb, restore and update: the kernels against the plain-torch twins, bit for bit, and against the formula."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_engine.triton_kernels import BLOCK, ElementTable, block, build_table, perturb, reference, restore, update
from tests.conftest import same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = SimpleNamespace(perturb_=perturb.perturb_, restore_=restore.restore_, update_=update.update_)


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


def masters_of(weights: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
    # away from the weights' own grid, as after some updates
    return torch.cat([w[o].float() for w, o in zip(weights, offsets, strict=True)]) + 1e-5


def run(ops: object, weights: list[torch.Tensor], bases: list[int], offsets: list[torch.Tensor]) -> list[torch.Tensor]:
    """All operations one after the other; the weights after each, and the masters."""
    live = [w.clone() for w in weights]
    table = build_table(live, bases, offsets)
    master = masters_of(weights, offsets)
    seen = []
    ops.perturb_(table, master, 2**63 + 5, 1e-3)  # type: ignore[attr-defined]
    seen += [w.clone() for w in live]
    ops.perturb_(table, master, 2**63 + 5, -1e-3)  # type: ignore[attr-defined]
    seen += [w.clone() for w in live]
    ops.update_(table, master, 7, 0.0371)  # type: ignore[attr-defined]
    seen += [w.clone() for w in live]
    ops.perturb_(table, master, 1, 0.5)  # type: ignore[attr-defined]
    ops.restore_(table, master)  # type: ignore[attr-defined]
    return [*seen, *live, master]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", ["all", "first", "last", "sparse"])
@pytest.mark.parametrize("sizes", [[1], [63], [1000], [BLOCK, BLOCK + 1, 3], [5, 4096, 1]], ids=str)
def test_kernels_match_the_reference(sizes: list[int], elements: str, dtype: torch.dtype) -> None:
    weights = weights_of(sizes, dtype)
    bases = [2**32 - 3 + sum(sizes[:i]) for i in range(len(sizes))]  # across the 32-bit boundary
    offsets = [layout(elements, n) for n in sizes]
    for a, b in zip(run(KERNELS, weights, bases, offsets), run(reference, weights, bases, offsets), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("ops", [KERNELS, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operations_are_their_formulas(dtype: torch.dtype, ops: object) -> None:
    weights, offsets = weights_of([3000], dtype), [torch.arange(0, 3000, 3)]
    z = reference.normal(2**63 + 5, offsets[0] + 100)
    plus, minus, updated, restored, master = run(ops, weights, [100], offsets)
    before = masters_of(weights, offsets)
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
    master = torch.zeros(offsets.numel())
    ops.perturb_(table, master, 3, 1.0)  # type: ignore[attr-defined]
    touched = torch.zeros(4096, dtype=torch.bool)
    touched[1024 + offsets] = True
    assert torch.equal(guarded != 7.0, touched)


def test_masks_nest_and_sparse_is_dense_on_the_mask() -> None:
    n = 5000
    dense_weight, sparse_weight = torch.zeros(n), torch.zeros(n)
    some = torch.arange(0, n, 11)
    KERNELS.perturb_(build_table([dense_weight], [40], [torch.arange(n)]), torch.zeros(n), 8, 1.0)
    KERNELS.perturb_(build_table([sparse_weight], [40], [some]), torch.zeros(some.numel()), 8, 1.0)
    assert same_bits(sparse_weight[some], dense_weight[some])
    assert sparse_weight.count_nonzero() == some.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restore_is_exact_after_many_cycles(dtype: torch.dtype) -> None:
    (weight,) = weights_of([2000], dtype)
    before, offsets = weight.clone(), torch.arange(0, 2000, 2)
    table = build_table([weight], [0], [offsets])
    master = weight[offsets].float()
    for seed in range(1000):
        reference.perturb_(table, master, seed, 1e-3)
        reference.perturb_(table, master, seed, -1e-3)
        reference.restore_(table, master)
    assert same_bits(weight, before)


@triton.jit
def _round_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, block.round_to(tl.load(x_ptr + at), y_ptr.dtype.element_ty))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy, on the way to an infinite float16
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_torchs_for_every_kind_of_number(dtype: torch.dtype, generator: torch.Generator) -> None:
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
def test_any_layout_and_scale(counts: list[int], share: float, seed: int, scale: float) -> None:
    weights = weights_of(counts, torch.bfloat16)
    offsets = [torch.arange(0, n, max(1, round(1 / share))) for n in counts]
    bases = [sum(counts[:i]) for i in range(len(counts))]
    live = [[w.clone() for w in weights] for _ in range(2)]
    for ops, mine in zip((KERNELS, reference), live, strict=True):
        ops.perturb_(build_table(mine, bases, offsets), masters_of(weights, offsets), seed, scale)  # type: ignore[attr-defined]
    assert all(same_bits(a, b) for a, b in zip(*live, strict=True))


def test_windows_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of([700, 900, 5], torch.float32)
    offsets = [torch.arange(0, n, 2) for n in (700, 900, 5)]
    whole = run(reference, weights, [0, 700, 1600], offsets)
    monkeypatch.setattr(reference, "_WINDOW", 97)
    monkeypatch.setattr(reference, "_CHUNK", 13)
    assert all(same_bits(a, b) for a, b in zip(run(reference, weights, [0, 700, 1600], offsets), whole, strict=True))


def test_blocks_never_straddle_tensors() -> None:
    sizes = [BLOCK + 5, 3, 2 * BLOCK]
    table = build_table([torch.zeros(n) for n in sizes], [0, 10**10, 2 * 10**10], [torch.arange(n) for n in sizes])
    covered = []
    for address, base, start, count in table.blocks.tolist():
        ((tensor,), _) = table.segments(start, start + count)
        assert (address, base) == (table.weights[tensor].data_ptr(), table.bases[tensor])
        assert 0 < count <= BLOCK
        covered += range(start, start + count)
    assert covered == list(range(table.nnz))


def test_ids_of_a_range() -> None:
    table: ElementTable = build_table(
        [torch.zeros(50), torch.zeros(9)], [7, 2**40], [torch.tensor([0, 3, 49]), torch.tensor([8])]
    )
    assert table.ids(0, 4).tolist() == [7, 10, 56, 2**40 + 8]
    assert table.ids(2, 4).tolist() == [56, 2**40 + 8]
    assert table.ids(1, 1).tolist() == []


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="one table needs one dtype and device"):
        build_table([torch.zeros(3), torch.zeros(3).half()], [0, 3], [torch.tensor([0])] * 2)


def test_transposed_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        build_table([torch.zeros(3, 4).T], [0], [torch.tensor([0])])
