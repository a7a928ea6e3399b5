"""What every masked kernel does around its arithmetic: find a block's elements, draw their normals, round to weights.

``DENSE`` is static: a table has offsets, or all elements of its tensors are masked (see ``ElementTable``).
"""

import triton
import triton.language as tl

from .philox import normal_at, normal_run


@triton.jit
def load_block(w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """The elements of this program's block.

    Args:
        w_like_ptr: pointer of the weights' type; its address is not used.
        blocks_ptr: see ``ElementTable.blocks``.
        offsets_ptr: see ``ElementTable.offsets``; not used if ``DENSE``.
        master_ptr: fp32 [slots].
        BLOCK: elements per program.
        DENSE: whether the table has no offsets.

    Returns:
        Pointers to the live weights, int64 element ids (``DENSE``: the id of the first), pointers to the masters, the
        masters, which lanes hold an element, and which hold a slot: [BLOCK] each.
    """
    block = blocks_ptr + tl.program_id(0).to(tl.int64) * 4
    # The hints are what the table promises; without them four neighbours would be four loads and not one of 16 bytes.
    start = tl.multiple_of(tl.load(block + 2), 4)
    count = tl.load(block + 3)
    lane = tl.arange(0, BLOCK)
    slots = lane < (count + 3) // 4 * 4
    masters_ptr = master_ptr + start + lane
    master = tl.load(masters_ptr, mask=slots, other=0.0)
    live = lane < count
    if DENSE:
        live = slots  # the same: a dense tensor's size is a multiple of 4
        w_ptr = tl.multiple_of(tl.load(block).to(w_like_ptr.dtype), 16) + lane
        ids = tl.load(block + 1)
    else:
        offsets = tl.load(offsets_ptr + start + lane, mask=slots, other=0).to(tl.int64)
        w_ptr = tl.load(block).to(w_like_ptr.dtype) + offsets
        ids = tl.load(block + 1) + offsets
    return w_ptr, ids, masters_ptr, master, live, slots


@triton.jit
def block_normals(seed, ids, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """``z`` of a block, from what ``load_block`` calls its ids."""
    return normal_run(seed, ids, BLOCK) if DENSE else normal_at(seed, ids)


@triton.jit
def stepped(master, z, c):
    """``master - c * z``, or the master where the coefficient is not finite: a step that is not taken."""
    return tl.where(tl.abs(c) < float("inf"), master - z * c, master)


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


__all__ = ["block_normals", "load_block", "round_to", "stepped"]
