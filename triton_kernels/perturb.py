"""``w <- cast(master + scale * z)`` on the masked elements of all tensors, in one launch.

The two points of the estimate are ``scale = +eps`` and ``scale = -eps``; ``-eps`` follows ``+eps`` directly, because
both start from the master and not from the weight (Meerkat, arXiv 2506.03337, section 3).
"""

import triton
import triton.language as tl
from torch import Tensor

from .block import load_block, round_to
from .elements import ElementTable
from .launch import launch_masked, seed_words
from .philox import normal_at


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
    w_ptr, ids, _, master, live = load_block(w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK)
    value = master + normal_at(seed_low, seed_high, ids) * scale
    tl.store(w_ptr, round_to(value, w_like_ptr.dtype.element_ty), mask=live)


def perturb_(table: ElementTable, master: Tensor, seed: int, scale: float) -> None:
    """See ``reference.perturb_``."""
    launch_masked(_perturb_kernel, table, master, scale=scale, **seed_words(seed))


__all__ = ["perturb_"]
