"""``master <- master - c * z``, then ``w <- cast(master)``, on the masked elements of all tensors, in one launch.

``c = lr * g``, the learning rate times the projected gradient (Meerkat, arXiv 2506.03337, section 3).
"""

import triton
import triton.language as tl
from torch import Tensor

from .elements import ElementTable
from .launch import MASKED, on_device_of, seed_words
from .philox import normal_at, round_to


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _update_kernel(
    w_like_ptr,
    blocks_ptr,
    offsets_ptr,
    master_ptr,
    seed_low: tl.int32,
    seed_high: tl.int32,
    c: tl.float32,
    BLOCK: tl.constexpr,
):
    block = blocks_ptr + tl.program_id(0).to(tl.int64) * 4
    w_ptr = tl.load(block).to(w_like_ptr.dtype)
    base, start, count = tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    lane = tl.arange(0, BLOCK)
    live = lane < count
    offsets = tl.load(offsets_ptr + start + lane, mask=live, other=0).to(tl.int64)
    master = tl.load(master_ptr + start + lane, mask=live, other=0.0)
    master = master - normal_at(seed_low, seed_high, base + offsets) * c
    tl.store(master_ptr + start + lane, master, mask=live)
    tl.store(w_ptr + offsets, round_to(master, w_like_ptr.dtype.element_ty), mask=live)


def update_(table: ElementTable, master: Tensor, seed: int, c: float) -> None:
    """See ``reference.update_``."""
    with on_device_of(master):
        _update_kernel[(table.blocks.shape[0],)](
            w_like_ptr=table.weights[0],
            blocks_ptr=table.blocks,
            offsets_ptr=table.offsets,
            master_ptr=master,
            **seed_words(seed),
            c=c,
            **MASKED.options(),
        )


__all__ = ["update_"]
