"""Replay: many updates in one launch. Each program keeps its masters in registers for all (seed, c).

Weights and masters are read and written once for the complete list, so drawing the normals takes most of the time.
"""

import triton
import triton.language as tl
from torch import Tensor

from .block import block_normals, count_updates, load_block, round_to, update_master
from .elements import ElementTable
from .launch import VALUES, launch_masked


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=VALUES)
def _replay_kernel(
    w_like_ptr,
    blocks_ptr,
    offsets_ptr,
    master_ptr,
    applied_ptr,
    seeds_ptr,
    c_ptr,
    n: tl.int32,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    w_ptr, ids, masters_ptr, master, live, slots, count = load_block(
        w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK, LAYOUT
    )
    for t in range(tl.where(count > 0, n, 0)):  # a part of a block may be empty
        master = update_master(master, block_normals(tl.load(seeds_ptr + t), ids, BLOCK, LAYOUT), tl.load(c_ptr + t))
    tl.store(masters_ptr, master, mask=slots)
    count_updates(applied_ptr, n)
    tl.store(w_ptr, round_to(master, w_like_ptr.dtype.element_ty), mask=live)


def replay_(
    table: ElementTable, master: Tensor, seeds: Tensor, c: Tensor, *, applied: Tensor | None = None, number: int = 0
) -> None:
    """Applies many updates in order; see ``reference.replay_``. A launch is one part, as in ``update.update_``."""
    launch_masked(_replay_kernel, table, master, applied_ptr=applied, seeds_ptr=seeds, c_ptr=c, n=seeds.numel())


__all__ = ["replay_"]
