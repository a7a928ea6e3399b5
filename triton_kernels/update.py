"""Update: ``master <- master - c * z``, ``w <- cast(master)`` on the masked elements of all tensors, in one launch.

``c = lr * g``, the learning rate times the projected gradient (Meerkat, arXiv 2506.03337, section 3). The fused variant
also perturbs the weights for the next query: ``w <- cast(master + scale * next z)``.
"""

import triton
import triton.language as tl
from torch import Tensor

from .block import block_normals, count_updates, load_block, round_to, update_master
from .elements import ElementTable
from .launch import VALUES, launch_masked


@triton.jit(do_not_specialize_on_alignment=VALUES)
def _update_kernel(
    w_like_ptr,
    blocks_ptr,
    offsets_ptr,
    master_ptr,
    applied_ptr,
    seed_ptr,
    c_ptr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    w_ptr, ids, masters_ptr, master, live, slots, _ = load_block(
        w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK, LAYOUT
    )
    master = update_master(master, block_normals(tl.load(seed_ptr), ids, BLOCK, LAYOUT), tl.load(c_ptr))
    tl.store(masters_ptr, master, mask=slots)
    count_updates(applied_ptr, 1)
    tl.store(w_ptr, round_to(master, w_like_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize_on_alignment=VALUES)
def _update_perturb_kernel(
    w_like_ptr,
    blocks_ptr,
    offsets_ptr,
    master_ptr,
    applied_ptr,
    seed_ptr,
    c_ptr,
    next_seed_ptr,
    scale_ptr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    w_ptr, ids, masters_ptr, master, live, slots, _ = load_block(
        w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK, LAYOUT
    )
    master = update_master(master, block_normals(tl.load(seed_ptr), ids, BLOCK, LAYOUT), tl.load(c_ptr))
    tl.store(masters_ptr, master, mask=slots)
    count_updates(applied_ptr, 1)
    value = master + block_normals(tl.load(next_seed_ptr), ids, BLOCK, LAYOUT) * tl.load(scale_ptr)
    tl.store(w_ptr, round_to(value, w_like_ptr.dtype.element_ty), mask=live)


def update_(
    table: ElementTable, master: Tensor, seed: Tensor, c: Tensor, *, applied: Tensor | None = None, number: int = 0
) -> None:
    """Applies one update; see ``reference.update_``. A launch is one part: the caller looks at ``applied``."""
    launch_masked(_update_kernel, table, master, applied_ptr=applied, seed_ptr=seed, c_ptr=c)


def update_perturb_(
    table: ElementTable,
    master: Tensor,
    seed: Tensor,
    c: Tensor,
    next_seed: Tensor,
    scale: Tensor,
    *,
    applied: Tensor | None = None,
    number: int = 0,
) -> None:
    """Applies one update and the next perturbation; see ``reference.update_perturb_`` and ``update_``."""
    launch_masked(
        _update_perturb_kernel,
        table,
        master,
        applied_ptr=applied,
        seed_ptr=seed,
        c_ptr=c,
        next_seed_ptr=next_seed,
        scale_ptr=scale,
    )


__all__ = ["update_", "update_perturb_"]
