"""Projected gradient and coefficients from a query's two losses, computed on the device: the host need not wait."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import VALUES, on_device_of


@triton.jit(do_not_specialize=["groups"], do_not_specialize_on_alignment=VALUES)
def _coefficients_kernel(out_ptr, losses_ptr, eps_ptr, lr_ptr, groups: tl.int32):
    plus = tl.load(losses_ptr).to(tl.float64)
    minus = tl.load(losses_ptr + 1).to(tl.float64)
    g = ((plus - minus) / (tl.load(eps_ptr) * 2)).to(tl.float32)
    tl.store(out_ptr, ((plus + minus) * 0.5).to(tl.float32))
    tl.store(out_ptr + 1, g)
    for group in range(groups):
        tl.store(out_ptr + 2 + group, (tl.load(lr_ptr + group) * g.to(tl.float64)).to(tl.float32))


def coefficients(losses: Tensor, eps: Tensor, lr: Tensor) -> Tensor:
    """Computes a query's record; see ``reference.coefficients``."""
    out = torch.empty(2 + lr.numel(), dtype=torch.float32, device=losses.device)
    with on_device_of(losses):
        _coefficients_kernel[(1,)](
            out_ptr=out,
            losses_ptr=losses,
            eps_ptr=eps,
            lr_ptr=lr,
            groups=lr.numel(),
            num_warps=1,
            enable_fp_fusion=False,
        )
    return out


__all__ = ["coefficients"]
