"""Shared code of all masked kernels: load a block's elements, draw their normals, round to the weights' dtype.

``LAYOUT`` is a compile-time constant: where the weights and ids of a table's elements are, see ``elements.Layout``.
"""

import triton
import triton.language as tl

from .elements import BLOCK as _BLOCK
from .elements import Layout as _Layout
from .philox import normal_at, normal_run

_TABLE_BLOCK = tl.constexpr(_BLOCK)  # elements per row of the table
_DENSE, _SCATTERED = tl.constexpr(int(_Layout.DENSE)), tl.constexpr(int(_Layout.SCATTERED))


@triton.jit
def load_block(w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """Loads the elements of this program: a block of the table, or a part of one if ``BLOCK`` is smaller.

    Args:
        w_like_ptr: pointer with the weights' type; its address is not used.
        blocks_ptr: pointer to ``ElementTable.blocks``.
        offsets_ptr: pointer to ``ElementTable.offsets``; not used if dense.
        master_ptr: pointer to the masters, fp32 [slots].
        BLOCK: number of elements per program.
        LAYOUT: ``Layout`` of the table, as an int.

    Returns:
        w_ptr: pointers to the live weights, [BLOCK].
        ids: element ids, int64 [BLOCK]; if dense, the id of the first element.
        masters_ptr: pointers to the masters, [BLOCK].
        master: masters, fp32 [BLOCK].
        live: lanes that hold an element, bool [BLOCK].
        slots: lanes that hold a slot, bool [BLOCK].
        count: number of elements; not positive if the program has none.
    """
    PARTS: tl.constexpr = _TABLE_BLOCK // BLOCK
    block = blocks_ptr + (tl.program_id(0) // PARTS).to(tl.int64) * 4
    first = tl.program_id(0) % PARTS * BLOCK
    # The table guarantees these alignment hints. With them, four neighbours are one load of 16 bytes instead of four.
    start = tl.multiple_of(tl.load(block + 2), 4) + first
    count = tl.load(block + 3) - first
    lane = tl.arange(0, BLOCK)
    slots = lane < (count + 3) // 4 * 4
    masters_ptr = master_ptr + start + lane
    master = tl.load(masters_ptr, mask=slots, other=0.0)
    live = lane < count
    if LAYOUT == _DENSE:
        live = slots  # equal, because a dense tensor's size is a multiple of 4
        # Four elements, as in the masters: the hint of 16 bytes would make a layout of eight for 2-byte weights, and a
        # conversion through shared memory.
        w_ptr = tl.multiple_of(tl.load(block).to(w_like_ptr.dtype), w_like_ptr.dtype.element_ty.primitive_bitwidth // 2)
        w_ptr += first + lane
        ids = tl.load(block + 1) + first
    else:
        offsets = tl.load(offsets_ptr + start + lane, mask=slots, other=0).to(tl.int64)
        w_ptr = tl.load(block).to(w_like_ptr.dtype) + (offsets if LAYOUT == _SCATTERED else first + lane)
        ids = tl.load(block + 1) + offsets
    return w_ptr, ids, masters_ptr, master, live, slots, count


@triton.jit
def block_normals(seed, ids, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """Draws ``z`` for a block: fp32 [BLOCK], from the ids that ``load_block`` returns."""
    return normal_run(seed, ids, BLOCK) if LAYOUT == _DENSE else normal_at(seed, ids)


@triton.jit
def update_master(master, z, c):
    """Returns ``master - c * z``, or the unchanged master if the coefficient is not finite (a skipped query)."""
    return tl.where(tl.abs(c) < float("inf"), master - z * c, master)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Rounds fp32 to the live weight's dtype, to nearest, ties to even.

    bfloat16 is rounded with integer operations: Triton's interpreter does not round its bfloat16 cast correctly, and
    every backend has to give the same bits. NaN stays NaN.
    """
    if dtype == tl.bfloat16:
        b = value.to(tl.uint32, bitcast=True)
        rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
        return tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def count_updates(applied_ptr, n):
    """Adds ``n`` to the table's number of updates, once per launch.

    Args:
        applied_ptr: pointer to the number, int32 [1]; None counts nothing.
        n: number of updates in this launch.
    """
    if applied_ptr is not None:  # noqa: SIM102, known when the kernel is compiled
        if tl.program_id(0) == 0:
            tl.store(applied_ptr, tl.load(applied_ptr) + n)


__all__ = ["block_normals", "count_updates", "load_block", "round_to", "update_master"]
