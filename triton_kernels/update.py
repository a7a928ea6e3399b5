"""``master <- master - c * z``, then ``w <- cast(master)``, on the masked elements of all tensors, in one launch.

``c = lr * g``, the learning rate times the projected gradient (Meerkat, arXiv 2506.03337, section 3).
"""

import triton
import triton.language as tl
from torch import Tensor

from .block import load_block, round_to
from .elements import ElementTable
from .launch import launch_masked, seed_words
from .philox import normal_at


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
    w_ptr, ids, masters_ptr, master, live = load_block(w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK)
    master = master - normal_at(seed_low, seed_high, ids) * c
    tl.store(masters_ptr, master, mask=live)
    tl.store(w_ptr, round_to(master, w_like_ptr.dtype.element_ty), mask=live)


def update_(table: ElementTable, master: Tensor, seed: int, c: float) -> None:
    """See ``reference.update_``."""
    launch_masked(_update_kernel, table, master, c=c, **seed_words(seed))


__all__ = ["update_"]
