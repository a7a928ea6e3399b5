"""``<gradient, z_s>`` and ``<z_s, z_s>`` over the mask for many seeds, in one pass.

GradIP is the first product times the projected gradient; its cosine needs both products (Meerkat, arXiv 2506.03337,
section 4). Each program keeps its elements' gradient and ids in registers for all seeds, and writes two float64 per
seed. ``reference.inner`` defines the order of the sums; a program computes a subtree of each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import VALUES, config_of, on_device_of
from .philox import normal_at
from .reference import tree_sum

_SUMS = 1 << 25  # maximum number of partial sums at a time, 256 MiB


@triton.jit
def _tree_sum(values, N: tl.constexpr, LEVELS: tl.constexpr):
    """Adds neighbours until one value is left: [1]. A sum of two values has only one order, in any layout."""
    for level in tl.static_range(LEVELS):
        values = tl.sum(tl.reshape(values, [N >> (level + 1), 2]), axis=1)
    return values


@triton.jit(do_not_specialize=["k", "n"], do_not_specialize_on_alignment=VALUES)
def _inner_kernel(
    sums_ptr,
    gradient_ptr,
    ids_ptr,
    seeds_ptr,
    k: tl.int64,
    n: tl.int32,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    live = at < k
    gradient = tl.load(gradient_ptr + at, mask=live, other=0.0).to(tl.float64)
    ids = tl.load(ids_ptr + at, mask=live, other=0)
    for t in range(n):
        z = normal_at(tl.load(seeds_ptr + t), ids).to(tl.float64)
        z = tl.where(live, z, 0.0)
        at_sums = sums_ptr + 2 * t * tl.num_programs(0).to(tl.int64) + chunk + tl.arange(0, 1)
        tl.store(at_sums, _tree_sum(gradient * z, BLOCK, LEVELS))
        tl.store(at_sums + tl.num_programs(0), _tree_sum(z * z, BLOCK, LEVELS))


def inner(gradient: Tensor, ids: Tensor, seeds: Tensor) -> Tensor:
    """Computes ``<gradient, z>`` and ``<z, z>`` for each seed; see ``reference.inner``."""
    with on_device_of(gradient):
        config = config_of(_inner_kernel)
        chunks = triton.cdiv(ids.numel(), config.block)
        products = gradient.new_empty((seeds.numel(), 2), dtype=torch.float64)
        at_once = max(1, _SUMS // max(1, 2 * chunks))
        for part, part_seeds in zip(products.split(at_once), seeds.split(at_once), strict=True):
            sums = gradient.new_empty((part_seeds.numel(), 2, chunks), dtype=torch.float64)
            _inner_kernel[(chunks,)](
                sums_ptr=sums,
                gradient_ptr=gradient.contiguous(),
                ids_ptr=ids.contiguous(),
                seeds_ptr=part_seeds,
                k=ids.numel(),
                n=part_seeds.numel(),
                LEVELS=config.block.bit_length() - 1,
                **config.options(),
            )
            part.copy_(tree_sum(sums))
    return products


__all__ = ["inner"]
