"""``w <- cast(master)`` on the masked elements of all tensors, in one launch: exact, nothing drifts."""

import triton
import triton.language as tl
from torch import Tensor

from .elements import ElementTable
from .launch import MASKED, on_device_of
from .philox import round_to


@triton.jit
def _restore_kernel(w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK: tl.constexpr):
    block = blocks_ptr + tl.program_id(0).to(tl.int64) * 4
    w_ptr = tl.load(block).to(w_like_ptr.dtype)
    start, count = tl.load(block + 2), tl.load(block + 3)
    lane = tl.arange(0, BLOCK)
    live = lane < count
    offsets = tl.load(offsets_ptr + start + lane, mask=live, other=0).to(tl.int64)
    master = tl.load(master_ptr + start + lane, mask=live, other=0.0)
    tl.store(w_ptr + offsets, round_to(master, w_like_ptr.dtype.element_ty), mask=live)


def restore_(table: ElementTable, master: Tensor) -> None:
    """See ``reference.restore_``."""
    with on_device_of(master):
        _restore_kernel[(table.blocks.shape[0],)](
            w_like_ptr=table.weights[0],
            blocks_ptr=table.blocks,
            offsets_ptr=table.offsets,
            master_ptr=master,
            **MASKED.options(),
        )


__all__ = ["restore_"]
