"""Compiled reads and writes of masked weights have the effect of torch's."""

import pytest
import torch

from meerkat_engine.triton_kernels import build_table, numba_access, reference
from meerkat_engine.triton_kernels.elements import ElementTable

from helpers.tensors import same_bits

SIZES, BASES = (40, 8, 4000, 12), (0, 40, 48, 4048)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_table(dtype: torch.dtype, *, dense: bool = False, wide: bool = False) -> ElementTable:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = [torch.randn(n).to(dtype) for n in SIZES]
        offsets = None if dense else [torch.randperm(n)[: max(1, n // 3)].sort().values for n in SIZES]
    table = build_table(weights, BASES, offsets)
    if wide:  # as of a tensor with over 2**31 elements
        assert table.offsets is not None
        object.__setattr__(table, "offsets", table.offsets.long())
    return table


@pytest.mark.parametrize("kind", [{}, {"dense": True}, {"wide": True}], ids=["sparse", "dense", "int64 offsets"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 12, 16])
@pytest.mark.parametrize("stop", [16, 24, None])
def test_ranges_of_slots(dtype: torch.dtype, kind: dict[str, bool], start: int, stop: int | None) -> None:
    table, expected, before = (make_table(dtype, **kind) for _ in range(3))
    stop = table.slots if stop is None else stop
    values = torch.linspace(-9, 9, table.slots).to(dtype)[start:stop]
    values[::5] = float("nan")
    values[1::7] = -0.0
    numba_access.scatter_(table, start, values)
    reference.scatter_(expected, start, values)
    live, expected_live = (torch.full_like(values, 7) for _ in range(2))
    numba_access.gather(table, start, live)
    reference.gather(expected, start, expected_live)
    assert same_bits(live, expected_live)
    assert all(map(same_bits, table.weights, expected.weights))
    assert (start == stop) == all(map(same_bits, table.weights, before.weights))


def test_slots_without_an_element_are_not_written_and_not_read() -> None:
    table = build_table([torch.zeros(9), torch.zeros(5)], (0, 9), [torch.tensor([8]), torch.tensor([0, 4])])
    numba_access.scatter_(table, 0, torch.arange(1.0, 9.0))
    assert [weight.tolist() for weight in table.weights] == [[0] * 8 + [1], [5, 0, 0, 0, 6]]
    live = torch.full((8,), -1.0)
    numba_access.gather(table, 0, live)
    assert live.tolist() == [1, -1, -1, -1, 5, 6, -1, -1]


def test_values_that_are_not_contiguous_are_written_too() -> None:
    table = build_table([torch.zeros(8)], (0,), [torch.tensor([1, 3, 5, 7])])
    numba_access.scatter_(table, 0, torch.arange(8.0)[::2])
    assert table.weights[0].tolist() == [0, 0, 0, 2, 0, 4, 0, 6]
