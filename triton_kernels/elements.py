"""Where the masked elements of a model live in memory, as kernels and reference need it.

One table covers all masked elements of all tensors of one dtype on one device, so that an operation is one launch.
The elements are cut into blocks of at most ``BLOCK`` that never straddle two tensors; a program takes one block, reads
its four numbers once, and finds every weight at ``address + offset * itemsize`` and its element id at ``base + offset``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ElementTable:
    """The masked elements of some tensors, in id order within each tensor.

    Args:
        weights: flat views (one dimension, contiguous) of the live tensors, all of one dtype and device.
        bases: element id of each tensor's first element.
        starts: where each tensor's elements begin in ``offsets``; one more entry than tensors, the last is nnz.
        offsets: int32 [nnz] (int64 if a tensor has more than 2**31 elements), flat offset of each element in its tensor.
        blocks: int64 [n_blocks, 4]: address of the tensor, its base id, first element, number of elements (<= BLOCK).
    """

    weights: tuple[Tensor, ...]
    bases: tuple[int, ...]
    starts: tuple[int, ...]
    offsets: Tensor
    blocks: Tensor

    @property
    def nnz(self) -> int:
        """Number of masked elements."""
        return self.offsets.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the live weights."""
        return self.weights[0].dtype

    def segments(self) -> Iterator[tuple[Tensor, int, int]]:
        """For each tensor its flat weights and its range ``[start, stop)`` among the masked elements."""
        return zip(self.weights, self.starts[:-1], self.starts[1:], strict=True)

    def ids(self) -> Tensor:
        """Element ids, int64 [nnz]; made anew from the offsets at each call."""
        counts = torch.tensor(self.starts).diff()
        bases = torch.tensor(self.bases).repeat_interleave(counts)
        return self.offsets.long() + bases.to(self.offsets.device)


def build_table(weights: Sequence[Tensor], bases: Sequence[int], offsets: Sequence[Tensor]) -> ElementTable:
    """The table of some tensors' masked elements.

    Args:
        weights: contiguous tensors of one dtype and device; their memory is what the operations write.
        bases: element id of each tensor's first element.
        offsets: per tensor, int64 [n_i], sorted flat offsets of its masked elements; n_i > 0.

    Raises:
        ValueError: if the tensors differ in dtype or device, or one is not contiguous.
    """
    device, dtype = weights[0].device, weights[0].dtype
    for weight in weights:
        if weight.device != device or weight.dtype != dtype:
            raise ValueError(f"one table needs one dtype and device; got {weight.dtype} on {weight.device} "
                             f"beside {dtype} on {device}")  # fmt: skip
        if not weight.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(weight.shape)} is not contiguous; call .contiguous() first")
    counts = torch.tensor([o.numel() for o in offsets])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    small = max(w.numel() for w in weights) <= _INT32_MAX
    flat = tuple(w.detach().view(-1) for w in weights)
    blocks = []
    for weight, base, start, count in zip(flat, bases, starts.tolist(), counts.tolist(), strict=False):
        first = torch.arange(0, count, BLOCK)
        row = torch.empty(first.numel(), 4, dtype=torch.int64)
        row[:, 0], row[:, 1] = weight.data_ptr(), base
        row[:, 2], row[:, 3] = first + start, (count - first).clamp(max=BLOCK)
        blocks.append(row)
    return ElementTable(
        weights=flat,
        bases=tuple(bases),
        starts=tuple(starts.tolist()),
        offsets=torch.cat([o.to(torch.int32 if small else torch.int64) for o in offsets]).to(device),
        blocks=torch.cat(blocks).to(device),
    )


__all__ = ["BLOCK", "ElementTable", "build_table"]
