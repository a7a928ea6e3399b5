"""Kernels that draw ``z`` for a list of element ids, and Philox words for a list of blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elements import BLOCK
from .launch import VALUES, config_of, on_device_of
from .philox import normal_at, words
from .reference import seed_tensor


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=VALUES)
def _normal_kernel(z_ptr, ids_ptr, seed_ptr, n: tl.int64, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    ids = tl.load(ids_ptr + at, mask=live, other=0)
    tl.store(z_ptr + at, normal_at(tl.load(seed_ptr), ids), mask=live)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=VALUES)
def _bits_kernel(words_ptr, blocks_ptr, seed_ptr, n: tl.int64, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    x0, x1, x2, x3 = words(tl.load(seed_ptr), tl.load(blocks_ptr + at, mask=live, other=0))
    tl.store(words_ptr + at * 4, x0.to(tl.int64), mask=live)
    tl.store(words_ptr + at * 4 + 1, x1.to(tl.int64), mask=live)
    tl.store(words_ptr + at * 4 + 2, x2.to(tl.int64), mask=live)
    tl.store(words_ptr + at * 4 + 3, x3.to(tl.int64), mask=live)


def normal(seed: int, ids: Tensor) -> Tensor:
    """Draws ``z`` for element ids; see ``reference.normal``."""
    ids = ids.contiguous()
    z = torch.empty(ids.numel(), dtype=torch.float32, device=ids.device)
    if ids.numel():
        with on_device_of(ids):
            _normal_kernel[(triton.cdiv(ids.numel(), BLOCK),)](
                z_ptr=z,
                ids_ptr=ids,
                seed_ptr=seed_tensor(seed, ids.device),
                n=ids.numel(),
                **config_of(_normal_kernel).options(),
            )
    return z


def bits(seed: int, blocks: Tensor) -> Tensor:
    """Computes the Philox words of blocks; see ``reference.bits``."""
    blocks = blocks.contiguous()
    out = torch.empty(blocks.numel(), 4, dtype=torch.int64, device=blocks.device)
    if blocks.numel():
        with on_device_of(blocks):
            _bits_kernel[(triton.cdiv(blocks.numel(), BLOCK),)](
                words_ptr=out,
                blocks_ptr=blocks,
                seed_ptr=seed_tensor(seed, blocks.device),
                n=blocks.numel(),
                **config_of(_bits_kernel).options(),
            )
    return out


__all__ = ["bits", "normal"]
