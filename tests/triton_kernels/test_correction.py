"""The sparse correction of a linear layer's output: kernel and twin have the bits of the formula."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from meerkat_engine.triton_kernels import correction, correction_reference
from meerkat_engine.triton_kernels.correction_reference import CorrectionRows, correction_rows

from helpers.tensors import same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IN, OUT = 37, 70  # three programs of rows, and no multiple of anything
Correct = Callable[[torch.Tensor, torch.Tensor, CorrectionRows, torch.Tensor, torch.Tensor], None]
OPS = pytest.mark.parametrize(
    "correct_", [correction.correct_, correction_reference.correct_], ids=["kernel", "reference"]
)


def offsets_of(layout: str) -> torch.Tensor:
    """Flat offsets of masked elements in a weight [OUT, IN]."""
    generator = torch.Generator().manual_seed(1)
    scattered: torch.Tensor = (torch.rand(OUT * IN, generator=generator) < 0.05).nonzero().squeeze(1)
    choices: dict[str, torch.Tensor] = {
        "none": torch.empty(0, dtype=torch.int64),
        "first": torch.tensor([0]),
        "last": torch.tensor([OUT * IN - 1]),
        "edges": torch.tensor([0, IN - 1, IN, 2 * IN - 1, (OUT - 1) * IN, OUT * IN - 1]),
        "row": torch.arange(5 * IN, 6 * IN),
        "column": torch.arange(3, OUT * IN, IN),
        "scattered": scattered,
        "uneven": torch.cat((scattered, torch.arange(IN, 2 * IN), torch.arange(40 * IN, 41 * IN))).unique(),
        "all": torch.arange(OUT * IN),
    }
    return choices[layout]


def inputs(
    offsets: torch.Tensor, tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, CorrectionRows, torch.Tensor, torch.Tensor]:
    """Random x, y, rows, values and base. The values are slices that begin at odd addresses."""
    generator = torch.Generator().manual_seed(0)
    n = offsets.numel()
    x, y = (torch.randn((tokens, size), generator=generator).to(dtype) for size in (IN, OUT))
    values, base = torch.randn(n + 1, generator=generator)[1:], torch.randn(n + 3, generator=generator)[3:]
    return x, y, correction_rows(offsets, IN), values, base


def formula(
    x: torch.Tensor, y: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor, base: torch.Tensor
) -> torch.Tensor:
    """The formula, one numpy float32 operation on all tokens at a time; only the last rounding is torch's."""
    x32, y32, live, fixed = (tensor.float().numpy() for tensor in (x, y, values, base))
    sums: dict[int, np.ndarray] = {}
    for j, offset in enumerate(offsets.tolist()):
        row, column = divmod(offset, IN)
        product = x32[:, column] * (live[j] - fixed[j])
        sums[row] = sums.get(row, np.zeros(x.shape[0], np.float32)) + product
    out = y.clone()
    for row, total in sums.items():
        assert total.dtype == np.float32
        out[:, row] = torch.from_numpy(y32[:, row] + total).to(y.dtype)
    return out


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits are equal, except that any NaN equals any other."""
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.nan_to_num(0, 3, 4), b.nan_to_num(0, 3, 4))


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layout", ["none", "first", "last", "edges", "row", "column", "scattered", "uneven", "all"], ids=str
)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_an_output_has_the_bits_of_the_formula(tokens: int, layout: str, dtype: torch.dtype, correct_: Correct) -> None:
    offsets = offsets_of(layout)
    x, y, rows, values, base = inputs(offsets, tokens, dtype)
    wanted = formula(x, y, offsets, values, base)
    given = [tensor.clone() for tensor in (x, values, base)]
    correct_(x, y, rows, values, base)
    assert same_bits(y, wanted)
    assert all(same_bits(a, b) for a, b in zip((x, values, base), given, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [(1, 8, 1), (2, 16, 3), (16, 128, 8)], ids=str)
def test_bits_do_not_depend_on_the_size_of_a_program(
    config: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for correct_ in (correction.correct_, correction_reference.correct_):
        for name, value in zip(("_TOKENS", "_ROWS", "_UNROLL"), config, strict=True):
            monkeypatch.setattr(correction, name, value)
        x, y, rows, values, base = inputs(offsets_of("uneven"), 5, dtype)
        correct_(x, y, rows, values, base)
        ends.append(y)
    assert same_bits(*ends)


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_output_is_that_of_a_weight_with_the_values_written_in(dtype: torch.dtype, correct_: Correct) -> None:
    offsets = offsets_of("uneven")
    x, _, rows, values, _ = inputs(offsets, 16, dtype)
    weight = torch.randn((OUT, IN), generator=torch.Generator().manual_seed(2)).to(dtype)
    live = weight.double()
    live.view(-1)[offsets] = values.double()
    y = x @ weight.t()
    correct_(x, y, rows, values, weight.view(-1)[offsets].float())
    wanted = x.double() @ live.t()
    # y is rounded twice, and once more inside a long sum: a few units of its last place.
    error = (y.double() - wanted).abs() / wanted.abs().clamp(min=1)
    assert float(error.max()) < 4 * torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)
    assert not torch.allclose((x @ weight.t()).double(), wanted, rtol=0.1, atol=0.1)  # the correction matters


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about inf * 0, inf - inf and overflow
@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_nan_overflow_and_ties_follow_the_formula(dtype: torch.dtype, correct_: Correct) -> None:
    inf, nan, big = float("inf"), float("nan"), torch.finfo(dtype).max
    offsets = torch.arange(OUT * IN)[: 30 * IN : 5]
    x, y, rows, values, base = inputs(offsets, 9, dtype)
    x[0, :20] = torch.tensor([0.0, -0.0, inf, -inf, nan] * 4).to(dtype)
    x[1] = 0
    x[2] = torch.linspace(-2, 2, IN).to(dtype)
    y[2] = 256 + torch.arange(OUT) % 4  # ties of bfloat16 after adding halves
    y[3] = big
    y[4] = inf
    y[5] = -0.0
    at = slice(15, 23)  # the third row; the second has one element less
    values[at] = torch.tensor([inf, -inf, nan, 0.0, -0.0, 3e38, 1e-45, 1.0])
    base[at] = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, -3e38, 0.0, 1.0])
    values[40:80] = base[40:80] + 0.5
    values[100:120] = big / 4
    wanted = formula(x, y, offsets, values, base)
    correct_(x, y, rows, values, base)
    assert same_numbers(y, wanted)
    assert 0 < int(y.isnan().sum()) < y.numel() // 2
    assert int(y.isinf().sum()) > 9


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_element_keep_their_bits(dtype: torch.dtype, correct_: Correct) -> None:
    """So do outputs whose row has no element in the column of an input that is NaN."""
    offsets = torch.tensor([3 * IN + 4, 40 * IN + 1])
    x, y, rows, _, _ = inputs(offsets, 9, dtype)
    x.fill_(float("nan"))
    x[:, 1] = 0.5
    y[:, 0], y[:, 1] = -0.0, float("nan")
    before = y.clone()
    correct_(x, y, rows, torch.tensor([2.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert bool(y[:, 3].isnan().all())
    y[:, 3] = before[:, 3]
    assert same_bits(y, before)


@OPS
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_of_zero_makes_an_output_of_minus_zero_positive(dtype: torch.dtype, n: int, correct_: Correct) -> None:
    x, y, rows, base, _ = inputs(torch.arange(n), 1, dtype)
    x[0, :n] = torch.tensor([-1.0, -0.0, 0.0, -2.0])[:n]
    values = base + torch.tensor([0.0, 1.0, -1.0, 0.0])[:n]  # every product is -0
    y[0, :2] = -0.0
    correct_(x, y, rows, values, base)
    assert [str(value) for value in y[0, :2].tolist()] == ["0.0", "-0.0"]


@OPS
def test_the_sum_is_taken_in_fp32_and_in_order_before_y_is_added(correct_: Correct) -> None:
    """Each other order, and each fused operation, gives another number here."""
    x, y = torch.tensor([[1.0, 1.0, 1.0, 1 + 2**-12]]), torch.ones(1, 1)
    rows = correction_rows(torch.tensor([0, 1, 2, 3]), 4)
    # 2**24 + 1 is 2**24, so the first three sum to 0; backwards, the four sum to 2. The last product is 1 + 2**-11.
    correct_(x, y, rows, torch.tensor([2.0**24, 1.0, -(2.0**24), 1 + 2**-12]), torch.zeros(4))
    assert y.tolist() == [[2 + 2**-11]]  # beginning with y: 1 + 2**-11
    y = torch.zeros(1, 1)
    correct_(x, y, rows, torch.tensor([0.0, 0.0, -(1 + 2**-11), 1 + 2**-12]), torch.zeros(4))
    assert y.tolist() == [[0.0]]  # fused: 2**-24


@OPS
def test_a_difference_is_rounded_before_it_is_multiplied(correct_: Correct) -> None:
    y = torch.zeros(1, 1)
    rows = correction_rows(torch.tensor([0]), 1)
    correct_(torch.tensor([[3.0]]), y, rows, torch.tensor([1.0]), torch.tensor([-(2.0**-25)]))
    assert y.tolist() == [[3.0]]


@OPS
def test_memory_around_an_output_is_not_written(correct_: Correct) -> None:
    offsets = offsets_of("all")
    x, y, rows, values, base = inputs(offsets, 9, torch.float32)
    around = torch.full((9 * OUT + 200,), 7.0)
    inside = around[93 : 93 + 9 * OUT].view(9, OUT)
    inside.copy_(y)
    correct_(x, inside, rows, values, base)
    correct_(x, y, rows, values, base)
    assert same_bits(inside, y)
    assert set(around[:93].tolist() + around[93 + 9 * OUT :].tolist()) == {7.0}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_elements_are_grouped_by_rows(dtype: torch.dtype) -> None:
    rows = correction_rows(torch.tensor([1, 2, 13, 70, 71, 79], dtype=dtype), 10)
    assert (rows.in_features, rows.last_row) == (10, 7)
    for found, wanted in ((rows.rows, [0, 1, 7]), (rows.starts, [0, 2, 3, 6]), (rows.columns, [1, 2, 3, 0, 1, 9])):
        assert found.dtype == torch.int32
        assert found.tolist() == wanted


def test_a_weight_of_more_than_2_to_the_31_elements_is_grouped() -> None:
    rows = correction_rows(torch.tensor([5, 2**31 + 5, 2**40 + 7]), 2**20)
    assert rows.rows.tolist() == [0, 2**11, 2**20]
    assert rows.columns.tolist() == [5, 5, 7]


def test_no_elements_are_no_rows() -> None:
    rows = correction_rows(torch.empty(0, dtype=torch.int64), 10)
    assert (rows.rows.tolist(), rows.starts.tolist(), rows.columns.tolist(), rows.last_row) == ([], [0], [], -1)


@pytest.mark.parametrize(
    ("offsets", "in_features", "message"),
    [
        (torch.tensor([1, 5, 5]), 10, r"sorted and unique; position 2 has 5 after 5"),
        (torch.tensor([1, 5, 4]), 10, r"sorted and unique; position 2 has 4 after 5"),
        (torch.tensor([-1, 5]), 10, r"must not be negative; position 0 has -1"),
        (torch.tensor([[1]]), 10, r"must be int32 or int64 \[n\], got torch.int64 \[1, 1\]"),
        (torch.tensor([1.0]), 10, r"must be int32 or int64 \[n\], got torch.float32 \[1\]"),
        (torch.tensor([1]), 0, r"between 1 and 2\*\*31 - 1"),
        (torch.tensor([1]), 2**31, r"between 1 and 2\*\*31 - 1"),
        (torch.tensor([2**62]), 2, r"the last offset is in row 2305843009213693952"),
    ],
    ids=["repeated", "falling", "negative", "matrix", "float", "no-columns", "columns", "rows"],
)
def test_wrong_offsets_are_refused(offsets: torch.Tensor, in_features: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        correction_rows(offsets, in_features)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"x": torch.zeros(4, IN).double(), "y": torch.zeros(4, OUT).double()}, "float32, bfloat16 or float16"),
    "dtypes": ({"x": torch.zeros(4, IN).half()}, r"x and y must both be .* got torch.float16 and torch.float32"),
    "vector": ({"x": torch.zeros(IN)}, r"x must be \[tokens, in_features\]"),
    "batch": ({"y": torch.zeros(1, 4, OUT)}, r"y \[tokens, out_features\], got \[4, 37\] and \[1, 4, 70\]"),
    "tokens": ({"x": torch.zeros(3, IN)}, r"got \[3, 37\] and \[4, 70\]"),
    "columns": ({"x": torch.zeros(4, IN + 1)}, "37 columns and at least 70 rows, but x has 38 columns and y 70"),
    "rows": ({"y": torch.zeros(4, OUT - 1)}, "37 columns and at least 70 rows, but x has 37 columns and y 69"),
    "few values": ({"values": torch.zeros(5)}, r"values must be float32 \[6\], got torch.float32 \[5\]"),
    "bf16 base": ({"base": torch.zeros(6).bfloat16()}, r"base must be float32 \[6\], got torch.bfloat16 \[6\]"),
    "x strides": ({"x": torch.zeros(IN, 4).t()}, r"x must be contiguous, got strides \[1, 4\]"),
    "y strides": ({"y": torch.zeros(4, 2 * OUT)[:, :OUT]}, r"y must be contiguous, got strides \[140, 1\]"),
    "values strides": ({"values": torch.zeros(12)[::2]}, r"values must be contiguous, got strides \[2\]"),
    "device": ({"x": torch.zeros(4, IN, device="meta")}, "x is on meta, but the elements' rows are on cpu"),
}


@OPS
@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_refused(name: str, correct_: Correct) -> None:
    changed, message = WRONG[name]
    x, y, rows, values, base = inputs(offsets_of("edges"), 4, torch.float32)
    given = {"x": x, "y": y, "values": values, "base": base} | changed
    before = given["y"].clone()
    with pytest.raises(ValueError, match=message):
        correct_(given["x"], given["y"], rows, given["values"], given["base"])
    assert same_bits(given["y"], before)


@OPS
def test_an_output_in_the_memory_of_the_input_is_refused(correct_: Correct) -> None:
    memory = torch.zeros(20)
    rows = correction_rows(torch.tensor([0]), 4)
    with pytest.raises(ValueError, match="x and y share memory"):
        correct_(memory[:8].view(2, 4), memory[7:15].view(2, 4), rows, torch.ones(1), torch.ones(1))
    correct_(memory[:8].view(2, 4), memory[8:16].view(2, 4), rows, torch.ones(1), torch.ones(1))
