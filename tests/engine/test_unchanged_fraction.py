"""The share of elements that a perturbation does not change; perturb and restore leave every bit in place."""

import time

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.bench.measure import peak_bytes
from meerkat_engine.engine import stream
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.weights import MaskedWeights
from meerkat_engine.triton_kernels import reference

from helpers.constants import DTYPES
from helpers.models import make_model
from helpers.tensors import flat_weights, same_bits

EPS = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]


def reference_fraction(model: nn.Module, seed: int, eps: float, ids: torch.Tensor) -> float:
    """Counts element by element, with the values that the dtype can hold; without mask, table and windows."""
    weights = [value for p in model.parameters() for value in p.detach().view(-1)]
    z, unchanged = stream.normal(seed, ids), 0
    for element, normal in zip(ids.tolist(), z, strict=True):
        weight, step = weights[element], normal * torch.tensor(eps)
        moved = [(weight.float() + sign * step).to(weight.dtype) for sign in (1, -1)]
        unchanged += all(value.item().hex() == weight.item().hex() for value in moved)
    return unchanged / len(ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_the_share_equals_a_count_element_by_element(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, backend: str
) -> None:
    monkeypatch.setattr(reference, "_WINDOW", 96)  # several windows, and tensors that lie across two
    model = make_model("llama", dtype)
    mask = SparseMask.random(model, 0.04, 1)
    weights = MaskedWeights(model, mask, backend)
    shares = [weights.unchanged_fraction(7, eps) for eps in EPS]
    assert shares == [reference_fraction(model, 7, eps, mask.ids) for eps in EPS]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0] > 0.8) == (dtype != torch.float32)
    assert shares[-1] < 0.1


@pytest.mark.parametrize(
    ("weight", "dtype", "eps", "share"),
    [
        (1.0, torch.bfloat16, 2**-8, None),  # a step down is half a step up, and z has both signs
        (1.0, torch.float16, 1e-9, 1.0),
        (0.0, torch.float16, 1e-9, 0.0),  # to -0, which has other bits
    ],
    ids=["a power of two", "all still", "zero"],
)
def test_the_share_is_right_for_extreme_weights(
    weight: float, dtype: torch.dtype, eps: float, share: float | None
) -> None:
    model = nn.Sequential(nn.Linear(7, 5, bias=False), nn.Linear(5, 7)).to(dtype)
    for p in model.parameters():
        p.data.fill_(weight)
    mask = SparseMask.random(model, 0.8, 1)
    found = MaskedWeights(model, mask, "torch").unchanged_fraction(7, eps)
    assert found == reference_fraction(model, 7, eps, mask.ids)
    if share is None:
        z = stream.normal(7, mask.ids) * 2**-8
        one_way = [((1 + sign * z).to(dtype) == 1).double().mean().item() for sign in (1, -1)]
        assert 0 < found < min(one_way)
    else:
        assert found == share


def test_padding_slots_are_not_counted() -> None:
    model = nn.Linear(7, 5, bias=False).to(torch.float16)
    opt = SparseZO(model, SparseMask.random(model, 0.6, 1), lr=1.0, eps=1e-9)
    opt.apply(3, 1.0)  # also moves the masters of the padding slots away from 0
    assert opt.weights.tables()[0].slots > len(opt.weights.mask)
    assert opt.unchanged_fraction() == 1.0


def test_in_bfloat16_a_usual_eps_leaves_many_weights_unchanged() -> None:
    lm = embedded.load(torch.bfloat16)
    opt = SparseZO(lm.model, SparseMask.magnitude(lm.model, 0.01), lr=0.1, eps=1e-3)
    wide = SparseZO(embedded.load().model, SparseMask.magnitude(lm.model, 0.01), lr=0.1, eps=1e-3)
    assert opt.unchanged_fraction() > 0.5
    assert wide.unchanged_fraction() < 0.01


def test_the_share_covers_all_groups_dtypes_and_tables(llama: nn.Module) -> None:
    """Tables with and without offsets, several dtypes and two groups: the share weights each by its elements."""
    llama.model.layers[0].mlp.to(torch.bfloat16)  # type: ignore[union-attr, index]
    llama.model.norm.to(torch.float16)  # type: ignore[union-attr]
    first, *rest = llama.parameters()
    opt = SparseZO(llama, SparseMask.dense(llama), lr=0.1, eps=1e-4, params=[{"params": [first]}, {"params": rest}])
    assert len(opt.weights.tables()) >= 4
    assert opt.unchanged_fraction(5) == reference_fraction(llama, 5, 1e-4, opt.weights.mask.ids)


def test_measuring_the_share_changes_nothing(llama: nn.Module) -> None:
    llama.to(torch.bfloat16)
    opt = SparseZO(llama, SparseMask.random(llama, 0.1, 1), lr=0.1, eps=1e-2, seed=3)
    at_w = opt.unchanged_fraction()
    assert at_w == opt.unchanged_fraction(stream.step_seed(3, 0, 0)) != opt.unchanged_fraction(1)
    opt.perturb(77, 0.25)
    before, masters = flat_weights(llama), opt.weights.masters()
    assert opt.unchanged_fraction() == at_w
    assert same_bits(flat_weights(llama), before)
    assert same_bits(opt.weights.masters(), masters)
    opt.restore()
    opt.apply(1, 1.0)
    opt.steps = 4
    assert opt.unchanged_fraction() == opt.unchanged_fraction(stream.step_seed(3, 0, 4))


def test_arguments_out_of_range_are_rejected(llama: nn.Module) -> None:
    opt = SparseZO(llama, SparseMask.random(llama, 0.1, 1), lr=0.1)
    with pytest.raises(ValueError, match="seed must be in"):
        opt.unchanged_fraction(-1)
    opt.param_groups[0]["eps"] = 0.0
    with pytest.raises(ValueError, match="eps must be finite and positive"):
        opt.unchanged_fraction()


def test_memory_is_proportional_to_the_mask() -> None:
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for _ in range(4)])
    weights = MaskedWeights(model, SparseMask.random(model, 0.1, 0), "torch")
    assert 4 <= peak_bytes(lambda: weights.unchanged_fraction(1, 1e-3), torch.device("cpu")) / len(weights.mask) <= 60


def run_cycles(dtype: torch.dtype, n: int, backend: str) -> None:
    """Perturbs to +eps and -eps and restores, ``n`` times with different seeds; compares every bit at the end."""
    lm = embedded.load(dtype)
    opt = SparseZO(lm.model, SparseMask.random(lm.model, 0.01, 1), lr=0.1, eps=1e-3, backend=backend)
    before, masters = flat_weights(lm.model), opt.weights.masters()
    start = time.perf_counter()
    for step in range(n):
        opt.perturb(stream.step_seed(1, 0, step), 1e-3)
        opt.perturb(stream.step_seed(1, 0, step), -1e-3)
        if step == n - 1:
            assert not same_bits(flat_weights(lm.model), before)
        opt.restore()
    print(f"{n:,} cycles in {dtype}: {time.perf_counter() - start:.1f} s")
    assert same_bits(flat_weights(lm.model), before)
    assert same_bits(opt.weights.masters(), masters)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_200_perturb_and_restore_cycles_leave_every_bit_in_place(dtype: torch.dtype, backend: str) -> None:
    run_cycles(dtype, 200, backend)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_100_000_perturb_and_restore_cycles_leave_every_bit_in_place(dtype: torch.dtype) -> None:
    run_cycles(dtype, 100_000, "auto")
