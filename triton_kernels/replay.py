"""Many updates in one launch: each program keeps its masters in registers while it goes through all (seed, c).

The weights and masters are read and written once for the whole list, so that the time is that of making the normals.
"""

import triton
import triton.language as tl
from torch import Tensor

from .block import block_normals, load_block, round_to, stepped
from .elements import ElementTable
from .launch import launch_masked


@triton.jit(do_not_specialize=["n"])
def _replay_kernel(
    w_like_ptr,
    blocks_ptr,
    offsets_ptr,
    master_ptr,
    seeds_ptr,
    c_ptr,
    n: tl.int32,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
):
    w_ptr, ids, masters_ptr, master, live, slots = load_block(
        w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK, DENSE
    )
    for t in range(n):
        master = stepped(master, block_normals(tl.load(seeds_ptr + t), ids, BLOCK, DENSE), tl.load(c_ptr + t))
    tl.store(masters_ptr, master, mask=slots)
    tl.store(w_ptr, round_to(master, w_like_ptr.dtype.element_ty), mask=live)


def replay_(table: ElementTable, master: Tensor, seeds: Tensor, c: Tensor) -> None:
    """See ``reference.replay_``."""
    launch_masked(_replay_kernel, table, master, seeds_ptr=seeds, c_ptr=c, n=seeds.numel())


__all__ = ["replay_"]
