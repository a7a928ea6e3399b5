"""What every masked kernel does around its arithmetic: find a block's elements, and round to the weights' dtype."""

import triton
import triton.language as tl


@triton.jit
def load_block(w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK: tl.constexpr):
    """The elements of this program's block.

    Args:
        w_like_ptr: pointer of the weights' type; its address is not used.
        blocks_ptr: see ``ElementTable.blocks``.
        offsets_ptr: see ``ElementTable.offsets``.
        master_ptr: fp32 [nnz].
        BLOCK: elements per program.

    Returns:
        Pointers to the live weights, int64 element ids, pointers to the masters, the masters, and which lanes hold an
        element: [BLOCK] each.
    """
    block = blocks_ptr + tl.program_id(0).to(tl.int64) * 4
    w_ptr = tl.load(block).to(w_like_ptr.dtype)
    base, start, count = tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    lane = tl.arange(0, BLOCK)
    live = lane < count
    offsets = tl.load(offsets_ptr + start + lane, mask=live, other=0).to(tl.int64)
    masters_ptr = master_ptr + start + lane
    master = tl.load(masters_ptr, mask=live, other=0.0)
    return w_ptr + offsets, base + offsets, masters_ptr, master, live


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 to the live weight's dtype, to nearest, ties to even.

    bfloat16 is rounded in integers: Triton's interpreter does not round its bfloat16 cast correctly, and every backend
    has to give the same bits. NaN stays NaN.
    """
    if dtype == tl.bfloat16:
        b = value.to(tl.uint32, bitcast=True)
        rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
        return tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


__all__ = ["load_block", "round_to"]
