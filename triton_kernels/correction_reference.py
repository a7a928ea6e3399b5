"""The sparse correction of a linear layer's output in plain torch: the specification of ``correction.correct_``.

A linear layer multiplies with a base weight that nothing writes, perhaps quantized. The live values of the masked
elements lie beside it. What the layer returns is corrected in place, by these elements alone:

    y[t, row] <- cast(y[t, row] + sum_j x[t, column_j] * (value_j - base_j))        j: the masked elements of the row

Every operation is one IEEE fp32 operation, rounded by itself. The sum begins with +0 and adds the products in the order
of the columns; then it is added to y in fp32, and the result is rounded once to the dtype of y. It follows that

- an output whose row has no masked element keeps its bits, and an input, NaN and infinity included, reaches only the
  outputs whose rows have an element in its column;
- the sum is never -0, so an output of -0 with a sum of 0 becomes +0;
- an infinite ``value - base`` times a 0 of x is NaN. NaN stays NaN; its bits are not specified.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class CorrectionRows:
    """The masked elements of one linear layer, by rows of its weight.

    Args:
        rows: rows that have masked elements, which are outputs of the layer: int32 [r], ascending.
        starts: the elements of ``rows[i]`` are ``starts[i]`` to ``starts[i + 1]``, at least one: int32 [r + 1].
        columns: column of each element, which is an input of the layer: int32 [n], ascending within a row.
        in_features: number of columns of the weight.
        last_row: the last of the rows; -1 if there are no elements.
    """

    rows: Tensor
    starts: Tensor
    columns: Tensor
    in_features: int
    last_row: int


def correction_rows(offsets: Tensor, in_features: int) -> CorrectionRows:
    """Groups the masked elements of a weight [out_features, in_features] by rows, on the device of their offsets.

    Args:
        offsets: flat offsets of the elements in the weight, int32 or int64 [n], sorted and unique.
        in_features: number of columns of the weight.

    Raises:
        ValueError: for offsets of another shape or dtype, negative, not sorted, or repeated; for a size that int32
            does not hold.
    """
    if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be int32 or int64 [n], got {offsets.dtype} {list(offsets.shape)}")
    if not 0 < in_features <= _INT32_MAX or offsets.numel() > _INT32_MAX:
        raise ValueError(
            f"the number of columns must be between 1 and 2**31 - 1, and that of elements at most 2**31 - 1; got "
            f"{in_features} and {offsets.numel()}"
        )
    if not offsets.numel():
        none = offsets.to(torch.int32)
        return CorrectionRows(rows=none, starts=none.new_zeros(1), columns=none, in_features=in_features, last_row=-1)
    falling = (offsets[1:] <= offsets[:-1]).nonzero()
    if falling.numel():
        at = int(falling[0]) + 1
        raise ValueError(
            f"offsets must be sorted and unique; position {at} has {int(offsets[at])} after {int(offsets[at - 1])}"
        )
    if (first := int(offsets[0])) < 0:
        raise ValueError(f"offsets must not be negative; position 0 has {first}")
    if (last_row := int(offsets[-1]) // in_features) > _INT32_MAX:
        raise ValueError(f"rows must be at most 2**31 - 1; the last offset is in row {last_row}")
    row_of = offsets // in_features
    rows, counts = torch.unique_consecutive(row_of, return_counts=True)
    return CorrectionRows(
        rows=rows.to(torch.int32),
        starts=torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32),
        columns=(offsets - row_of * in_features).to(torch.int32),
        in_features=in_features,
        last_row=last_row,
    )


def check_inputs(x: Tensor, y: Tensor, rows: CorrectionRows, values: Tensor, base: Tensor) -> None:
    """Checks the arguments of ``correct_`` by what the host knows of them, without waiting for a device.

    Raises:
        ValueError: if one has a wrong shape, dtype, device or layout, or if x and y share memory.
    """
    n, device = rows.columns.numel(), rows.columns.device
    if y.dtype not in _DTYPES or x.dtype != y.dtype:
        raise ValueError(f"x and y must both be float32, bfloat16 or float16, got {x.dtype} and {y.dtype}")
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"x must be [tokens, in_features] and y [tokens, out_features], got {list(x.shape)} and {list(y.shape)}"
        )
    if x.shape[1] != rows.in_features or y.shape[1] <= rows.last_row:
        raise ValueError(
            f"the elements are of a weight with {rows.in_features} columns and at least {rows.last_row + 1} rows, but "
            f"x has {x.shape[1]} columns and y {y.shape[1]}"
        )
    for name, tensor in (("values", values), ("base", base)):
        if tensor.dtype != torch.float32 or tensor.shape != (n,):
            raise ValueError(f"{name} must be float32 [{n}], got {tensor.dtype} {list(tensor.shape)}")
    for name, tensor in (("x", x), ("y", y), ("values", values), ("base", base)):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but the elements' rows are on {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}; call contiguous()")
    if x.data_ptr() < y.data_ptr() + y.nbytes and y.data_ptr() < x.data_ptr() + x.nbytes:
        raise ValueError("x and y share memory, so that correcting y would change x; give y its own memory")


def correct_(x: Tensor, y: Tensor, rows: CorrectionRows, values: Tensor, base: Tensor) -> None:
    """Adds ``x @ (values - base).T`` to ``y``, of the masked elements alone: see the formula above.

    Without tokens or without elements, nothing changes.

    Args:
        x: the layer's input, float32, bfloat16 or float16 [tokens, in_features], contiguous.
        y: the layer's output, [tokens, out_features] in the dtype of x, contiguous; written.
        rows: the masked elements.
        values: their live values, float32 [n].
        base: the base's values at the elements, float32 [n].

    Raises:
        ValueError: see ``check_inputs``.
    """
    check_inputs(x, y, rows, values, base)
    at_rows, first, counts = rows.rows.long(), rows.starts[:-1].long(), rows.starts.diff()
    delta = values - base
    by_column = x.t().contiguous()
    sums = torch.zeros((at_rows.numel(), x.shape[0]), dtype=torch.float32, device=x.device)  # [r, tokens]
    for j in range(int(counts.max()) if counts.numel() else 0):
        longer = (counts > j).nonzero().squeeze(1)
        element = first[longer] + j
        product = by_column.index_select(0, rows.columns[element]).float() * delta[element].unsqueeze(1)
        sums.index_copy_(0, longer, sums.index_select(0, longer) + product)
    y.index_copy_(1, at_rows, (y.index_select(1, at_rows).float() + sums.t()).to(y.dtype))


__all__ = ["CorrectionRows", "check_inputs", "correct_", "correction_rows"]
