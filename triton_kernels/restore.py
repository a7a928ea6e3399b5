"""Restore: ``w <- cast(master)`` on the masked elements of all tensors, in one launch. Exact, so nothing drifts."""

import triton
import triton.language as tl
from torch import Tensor

from .block import load_block, round_to
from .elements import ElementTable
from .launch import VALUES, launch_masked


@triton.jit(do_not_specialize_on_alignment=VALUES)
def _restore_kernel(w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    w_ptr, _, _, master, live, _, _ = load_block(w_like_ptr, blocks_ptr, offsets_ptr, master_ptr, BLOCK, LAYOUT)
    tl.store(w_ptr, round_to(master, w_like_ptr.dtype.element_ty), mask=live)


def restore_(table: ElementTable, master: Tensor) -> None:
    """Sets ``w <- cast(master)``; see ``reference.restore_``."""
    launch_masked(_restore_kernel, table, master)


__all__ = ["restore_"]
