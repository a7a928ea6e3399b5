"""Compare: counts the live weights that something else has written, and the masters that the weights cannot hold."""

import triton
import triton.language as tl
from torch import Tensor

from .block import load_block, round_to
from .elements import ElementTable
from .launch import VALUES, launch_masked


@triton.jit(do_not_specialize_on_alignment=VALUES)
def _compare_kernel(
    w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, counts_ptr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr
):
    w_ptr, _, _, master, live, _, _ = load_block(w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK, LAYOUT)
    weight = tl.load(w_ptr, mask=live, other=0.0).to(tl.float32)
    wanted = round_to(master, w_like_ptr.dtype.element_ty).to(tl.float32)
    both_nan = (weight != weight) & (wanted != wanted)
    changed = tl.sum((live & (weight != wanted) & ~both_nan).to(tl.int32))
    infinite = (tl.abs(wanted) == float("inf")) & (tl.abs(master) < float("inf"))
    beyond = tl.sum((live & infinite).to(tl.int32))
    if changed + beyond > 0:  # almost never, so the atomics cost nothing
        tl.atomic_add(counts_ptr, changed.to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 1, beyond.to(tl.int64), sem="relaxed")


def compare(table: ElementTable, master: Tensor, counts: Tensor) -> None:
    """Adds to two counts; see ``reference.compare``."""
    launch_masked(_compare_kernel, table, master, counts_ptr=counts)


__all__ = ["compare"]
