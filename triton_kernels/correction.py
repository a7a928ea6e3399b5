"""Correct: ``y <- cast(y + x @ (values - base).T)`` over the masked elements of a linear layer, in place.

The layer's weight stays as it is, perhaps quantized; ``correction_reference`` has the formula and its order of sums.
"""

import triton
import triton.language as tl
from torch import Tensor

from .block import round_to
from .correction_reference import CorrectionRows, check_inputs, correction_rows
from .launch import on_device_of

# A program is one warp with 32 rows and 8 tokens. Its lanes are neighbouring rows of one token, because y is contiguous
# along them: where a row has a few masked elements on average, most rows have some, so that up to 16 lanes share a
# sector of 32 bytes. With a lane a token, every lane would read and write a sector of y for itself. The reads of x are
# scattered either way; programs that run together share the rows of x, which stay in the caches. An element's column
# and values are read once for the 8 tokens. One warp needs no barrier to find its longest row, and a long row keeps no
# other warp waiting. Chosen from the compilers' output, not from timings yet.
_TOKENS, _ROWS, _WARPS = 8, 32, 1
# Elements of a row in flight at a time: their columns are read together, then x at all of them, then they are added in
# order. So a row waits twice for four elements instead of eight times.
_UNROLL = 4

_INTS = ["n_tokens", "n_rows", "in_features", "out_features"]
# Nothing is read 16 bytes at a time, so no alignment is worth a compilation.
_POINTERS = ["x_ptr", "y_ptr", "rows_ptr", "starts_ptr", "columns_ptr", "values_ptr", "base_ptr"]


@triton.jit(do_not_specialize=_INTS, do_not_specialize_on_alignment=_POINTERS)
def _correct_kernel(
    x_ptr,
    y_ptr,
    rows_ptr,
    starts_ptr,
    columns_ptr,
    values_ptr,
    base_ptr,
    n_tokens: tl.int64,
    n_rows: tl.int32,
    in_features: tl.int64,
    out_features: tl.int64,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # Programs of the same tokens are neighbours. One axis of the grid, because the others end at 65,535 programs.
    parts = tl.cdiv(n_rows, ROWS)
    i = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(0) // parts).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_row = i < n_rows
    first = tl.load(starts_ptr + i, mask=is_row, other=0)
    length = tl.load(starts_ptr + i + 1, mask=is_row, other=0) - first
    x_ptr += (tl.minimum(token, n_tokens - 1) * in_features)[:, None]  # past the end, the last token again
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for j in range(0, tl.max(length), UNROLL):
        columns: tl.tuple = ()
        deltas: tl.tuple = ()
        for u in tl.static_range(UNROLL):
            at, live = first + (j + u), j + u < length
            columns += (tl.load(columns_ptr + at, mask=live, other=0),)
            delta = tl.load(values_ptr + at, mask=live, other=0.0) - tl.load(base_ptr + at, mask=live, other=0.0)
            deltas += (delta,)
        for u in tl.static_range(UNROLL):
            x = tl.load(x_ptr + columns[u][None, :], mask=(j + u < length)[None, :], other=0.0)
            # A lane whose row has ended adds 0 * 0 = +0. That changes no sum, because a sum is never -0.
            total += x.to(tl.float32) * deltas[u][None, :]
    row = tl.load(rows_ptr + i, mask=is_row, other=0)
    y_ptr += (token * out_features)[:, None] + row[None, :]
    live = is_row[None, :] & (token < n_tokens)[:, None]
    y = tl.load(y_ptr, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr, round_to(y + total, y_ptr.dtype.element_ty), mask=live)


def correct_(x: Tensor, y: Tensor, rows: CorrectionRows, values: Tensor, base: Tensor) -> None:
    """Adds the masked elements' share to a linear layer's output; see ``correction_reference.correct_``."""
    check_inputs(x, y, rows, values, base)
    n_tokens, n_rows = x.shape[0], rows.rows.numel()
    with on_device_of(x):
        _correct_kernel[(triton.cdiv(n_rows, _ROWS) * triton.cdiv(n_tokens, _TOKENS),)](
            x_ptr=x,
            y_ptr=y,
            rows_ptr=rows.rows,
            starts_ptr=rows.starts,
            columns_ptr=rows.columns,
            values_ptr=values,
            base_ptr=base,
            n_tokens=n_tokens,
            n_rows=n_rows,
            in_features=x.shape[1],
            out_features=y.shape[1],
            TOKENS=_TOKENS,
            ROWS=_ROWS,
            UNROLL=_UNROLL,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )


__all__ = ["CorrectionRows", "correct_", "correction_rows"]
