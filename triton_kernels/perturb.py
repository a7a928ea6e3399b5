"""``w <- cast(master + scale * z)`` on the masked elements of all tensors, in one launch.

The two points of the estimate are ``scale = +eps`` and ``scale = -eps``; ``-eps`` follows ``+eps`` directly, because
both start from the master and not from the weight (Meerkat, arXiv 2506.03337, section 3).
"""

import triton
import triton.language as tl
from torch import Tensor

from .elements import ElementTable
from .launch import MASKED, on_device_of, seed_words
from .philox import normal_at, round_to


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _perturb_kernel(
    w_like_ptr,
    blocks_ptr,
    offsets_ptr,
    master_ptr,
    seed_low: tl.int32,
    seed_high: tl.int32,
    scale: tl.float32,
    BLOCK: tl.constexpr,
):
    block = blocks_ptr + tl.program_id(0).to(tl.int64) * 4
    w_ptr = tl.load(block).to(w_like_ptr.dtype)
    base, start, count = tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    lane = tl.arange(0, BLOCK)
    live = lane < count
    offsets = tl.load(offsets_ptr + start + lane, mask=live, other=0).to(tl.int64)
    master = tl.load(master_ptr + start + lane, mask=live, other=0.0)
    value = master + normal_at(seed_low, seed_high, base + offsets) * scale
    tl.store(w_ptr + offsets, round_to(value, w_like_ptr.dtype.element_ty), mask=live)


def perturb_(table: ElementTable, master: Tensor, seed: int, scale: float) -> None:
    """See ``reference.perturb_``."""
    with on_device_of(master):
        _perturb_kernel[(table.blocks.shape[0],)](
            w_like_ptr=table.weights[0],
            blocks_ptr=table.blocks,
            offsets_ptr=table.offsets,
            master_ptr=master,
            **seed_words(seed),
            scale=scale,
            **MASKED.options(),
        )


__all__ = ["perturb_"]
