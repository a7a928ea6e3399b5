"""Parameters that the operations cannot write are refused when the masked weights are built."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO

from helpers.regression import make_mlp


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_masters_in_float32_cannot_hold_other_dtypes(dtype: torch.dtype) -> None:
    model = make_mlp()
    mask = SparseMask.random(model, 0.3, seed=1)
    model[0].weight.data = model[0].weight.data.to(dtype)
    before = model[0].weight.data.clone()
    with pytest.raises(ValueError, match=rf"'0.weight' has masked elements and is {dtype}, but masters are float32"):
        SparseZO(model, mask, lr=0.1)
    assert torch.equal(model[0].weight.data.view(torch.uint8), before.view(torch.uint8))


def test_other_dtypes_outside_the_mask_do_not_matter() -> None:
    model = make_mlp()
    mask = SparseMask.of_parameters(model, ["0.weight"])
    model[2].double()
    opt = SparseZO(model, mask, lr=0.1)
    opt.apply(3, 0.5)


def of_views(build: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> nn.Module:
    model = nn.Module()
    first, second = build(torch.randn(8, 6))
    model.first, model.second = nn.Parameter(first), nn.Parameter(second)
    return model


OVERLAPS = {
    "same address": lambda w: (w, w.view(6, 8)),
    "tail": lambda w: (w, w[4:]),
    "one element": lambda w: (w[:5], w.view(-1)[29:]),
    "reversed order": lambda w: (w[3:], w[:4]),
    "column": lambda w: (w, w[:, 2]),
}


@pytest.mark.parametrize("masked", ["first", "second"])
@pytest.mark.parametrize("overlap", sorted(OVERLAPS))
def test_parameters_that_share_memory_are_refused(overlap: str, masked: str) -> None:
    model = of_views(OVERLAPS[overlap])
    if not getattr(model, masked).is_contiguous():
        pytest.skip("a masked parameter must be contiguous anyway")
    with pytest.raises(ValueError, match=r"'first' and 'second' share memory|'second' and 'first' share memory"):
        SparseZO(model, SparseMask.of_parameters(model, [masked]), lr=0.1)


def test_neighbours_in_one_buffer_are_no_overlap() -> None:
    model = of_views(lambda w: (w[:4], w[4:]))
    SparseZO(model, SparseMask.dense(model), lr=0.1).apply(3, 0.5)


def test_overlaps_outside_the_mask_do_not_matter() -> None:
    model = of_views(lambda w: (w, w[4:]))
    model.third = nn.Parameter(torch.randn(5))
    SparseZO(model, SparseMask.of_parameters(model, ["third"]), lr=0.1).apply(3, 0.5)


def test_tensor_subclasses_are_refused() -> None:
    class Tagged(torch.Tensor):
        pass

    model = make_mlp()
    mask = SparseMask.random(model, 0.3, seed=1)
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Tagged))
    with pytest.raises(ValueError, match=r"'0\.weight' is a Tagged and not a plain tensor"):
        SparseZO(model, mask, lr=0.1)
