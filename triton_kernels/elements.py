"""Where the masked elements of a model live in memory, as kernels and reference need it.

One table covers the masked elements of all tensors of one dtype on one device, so that an operation is one launch.
The elements are cut into blocks of at most ``BLOCK`` that never straddle two tensors; a program takes one block,
reads its four numbers once, and finds a weight at ``address + offset * itemsize``, its element id at ``base + offset``.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ElementTable:
    """The masked elements of some tensors: tensor after tensor, in the order of their offsets.

    Args:
        weights: flat views (one dimension, contiguous) of the live tensors, all of one dtype and device.
        bases: element id of each tensor's first element.
        starts: where each tensor's elements begin in ``offsets``; one more entry than tensors, the last is nnz.
        offsets: int32 [nnz] (int64 if a tensor has over 2**31 elements), flat offset of each element in its tensor.
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

    def segments(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        """The tensors that hold the elements ``[start, stop)``: their numbers, and how many of these each holds."""
        tensors, counts = [], []
        tensor = bisect_right(self.starts, start) - 1
        while start < stop:
            end = min(self.starts[tensor + 1], stop)
            tensors.append(tensor)
            counts.append(end - start)
            start, tensor = end, tensor + 1
        return tensors, counts

    def ids(self, start: int, stop: int) -> Tensor:
        """Element ids of the elements ``[start, stop)``, int64; made anew from the offsets at each call."""
        tensors, counts = self.segments(start, stop)
        bases = torch.tensor([self.bases[tensor] for tensor in tensors], dtype=torch.int64)
        each = bases.repeat_interleave(torch.tensor(counts, dtype=torch.int64))
        return self.offsets[start:stop] + each.to(self.offsets.device)


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
            raise ValueError(
                f"one table needs one dtype and device; "
                f"got {weight.dtype} on {weight.device} beside {dtype} on {device}"
            )
        if not weight.is_contiguous():
            raise ValueError(f"a weight of shape {tuple(weight.shape)} is not contiguous; call .contiguous() first")
    counts = [o.numel() for o in offsets]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    flat = tuple(w.detach().view(-1) for w in weights)
    small = max(w.numel() for w in flat) <= _INT32_MAX
    return ElementTable(
        weights=flat,
        bases=tuple(bases),
        starts=tuple(starts),
        offsets=torch.cat([o.to(torch.int32 if small else torch.int64) for o in offsets]).to(device),
        blocks=torch.cat(
            [_blocks_of(w.data_ptr(), b, s, n) for w, b, s, n in zip(flat, bases, starts, counts, strict=False)]
        ).to(device),
    )


def _blocks_of(address: int, base: int, start: int, count: int) -> Tensor:
    first = torch.arange(0, count, BLOCK)
    blocks = torch.empty(first.numel(), 4, dtype=torch.int64)
    blocks[:, 0], blocks[:, 1] = address, base
    blocks[:, 2], blocks[:, 3] = first + start, (count - first).clamp(max=BLOCK)
    return blocks


__all__ = ["BLOCK", "ElementTable", "build_table"]
