"""Kernels that draw ``z`` for a list of element ids, Philox words for blocks, and radius and angle of words."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import VALUES, config_of, on_device_of
from .philox import normal_at, radius, sin_cos, words
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


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=VALUES)
def _polar_kernel(polar_ptr, words_ptr, n: tl.int64, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    x = tl.load(words_ptr + at, mask=live, other=0).to(tl.uint32)
    sin, cos = sin_cos(x)
    tl.store(polar_ptr + at, radius(x), mask=live)
    tl.store(polar_ptr + n + at, sin, mask=live)
    tl.store(polar_ptr + 2 * n + at, cos, mask=live)


def normal(seed: int, ids: Tensor) -> Tensor:
    """Draws ``z`` for element ids; see ``reference.normal``."""
    ids = ids.contiguous()
    z = torch.empty(ids.numel(), dtype=torch.float32, device=ids.device)
    if ids.numel():
        with on_device_of(ids):
            config = config_of(_normal_kernel)
            _normal_kernel[(triton.cdiv(ids.numel(), config.block),)](
                z_ptr=z,
                ids_ptr=ids,
                seed_ptr=seed_tensor(seed, ids.device),
                n=ids.numel(),
                **config.options(),
            )
    return z


def bits(seed: int, blocks: Tensor) -> Tensor:
    """Computes the Philox words of blocks; see ``reference.bits``."""
    blocks = blocks.contiguous()
    out = torch.empty(blocks.numel(), 4, dtype=torch.int64, device=blocks.device)
    if blocks.numel():
        with on_device_of(blocks):
            config = config_of(_bits_kernel)
            _bits_kernel[(triton.cdiv(blocks.numel(), config.block),)](
                words_ptr=out,
                blocks_ptr=blocks,
                seed_ptr=seed_tensor(seed, blocks.device),
                n=blocks.numel(),
                **config.options(),
            )
    return out


def polar(words: Tensor) -> Tensor:
    """Computes radius, sine and cosine of Philox words; see ``reference.radius`` and ``reference.sin_cos``.

    Both depend on 24 bits of a word, so all 2**24 values can be compared with the reference.

    Args:
        words: int64 [n], values in [0, 2**32).

    Returns:
        float32 [3, n].
    """
    words = words.contiguous()
    out = torch.empty(3, words.numel(), dtype=torch.float32, device=words.device)
    if words.numel():
        with on_device_of(words):
            config = config_of(_polar_kernel)
            _polar_kernel[(triton.cdiv(words.numel(), config.block),)](
                polar_ptr=out,
                words_ptr=words,
                n=words.numel(),
                **config.options(),
            )
    return out


__all__ = ["bits", "normal", "polar"]
