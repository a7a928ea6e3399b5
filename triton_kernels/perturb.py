"""Perturb: ``w <- cast(master + scale * z)`` on the masked elements of all tensors, in one launch.

The two points of the estimator are ``scale = +eps`` and ``scale = -eps``. ``-eps`` needs no restore after ``+eps``,
because both start from the master and not from the weight (Meerkat, arXiv 2506.03337, section 3).
"""

import triton
import triton.language as tl
from torch import Tensor

from .block import block_normals, load_block, round_to
from .elements import ElementTable
from .launch import VALUES, launch_masked


@triton.jit(do_not_specialize_on_alignment=VALUES)
def _perturb_kernel(
    w_like_ptr,
    blocks_ptr,
    offsets_ptr,
    master_ptr,
    seed_ptr,
    scale_ptr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    w_ptr, ids, _, master, live, _, _ = load_block(w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK, LAYOUT)
    value = master + block_normals(tl.load(seed_ptr), ids, BLOCK, LAYOUT) * tl.load(scale_ptr)
    tl.store(w_ptr, round_to(value, w_like_ptr.dtype.element_ty), mask=live)


def perturb_(table: ElementTable, master: Tensor, seed: Tensor, scale: Tensor) -> None:
    """Sets ``w <- cast(master + scale * z)``; see ``reference.perturb_``."""
    launch_masked(_perturb_kernel, table, master, seed_ptr=seed, scale_ptr=scale)


__all__ = ["perturb_"]
