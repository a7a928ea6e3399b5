"""Where the masked elements of a model live in memory, as kernels and reference need it.

One table covers the masked elements of all tensors of one dtype on one device, so that an operation is one launch.
An element has a slot: its place in ``offsets`` and in the masters. The slots of a tensor begin at a multiple of 4, so
that four neighbours are one 16-byte load; the up to three slots left over belong to no element and reach no weight.

The slots are cut into blocks of at most ``BLOCK`` that never straddle two tensors; a program takes one block, reads its
four numbers once, and finds a weight at ``address + offset * itemsize``, its element id at ``base + offset``.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024
ALIGN = 4
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ElementTable:
    """The masked elements of some tensors: tensor after tensor, in the order of their offsets.

    Args:
        weights: flat views (one dimension, contiguous) of the live tensors, all of one dtype and device.
        bases: element id of each tensor's first element.
        starts: first slot of each tensor, a multiple of ``ALIGN``; one more entry than tensors, the last is ``slots``.
        counts: number of masked elements of each tensor.
        offsets: int32 [slots] (int64 if a tensor has over 2**31 elements), flat offset in its tensor of each slot's
            element; None where all elements of all tensors are masked.
        blocks: int64 [n_blocks, 4]: address of the tensor, its base id, first slot, number of elements (<= ``BLOCK``).
            Without offsets: address and id of the block's own first element.
    """

    weights: tuple[Tensor, ...]
    bases: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    offsets: Tensor | None
    blocks: Tensor

    @property
    def nnz(self) -> int:
        """Number of masked elements."""
        return sum(self.counts)

    @property
    def slots(self) -> int:
        """Length of the masters."""
        return self.starts[-1]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The elements in the slots ``[start, stop)``: tensor, and the slots ``[low, high)`` of it that hold some."""
        for tensor in range(bisect_right(self.starts, start) - 1, len(self.counts)):
            low, high = self.starts[tensor], self.starts[tensor] + self.counts[tensor]
            if low >= stop:
                return
            if max(low, start) < min(high, stop):
                yield tensor, max(low, start), min(high, stop)

    def ids(self, start: int, stop: int) -> Tensor:
        """Element ids of the slots ``[start, stop)``, int64, 0 where there is none; made anew at each call."""
        ids = torch.zeros(stop - start, dtype=torch.int64, device=self.blocks.device)
        for tensor, low, high in self.pieces(start, stop):
            first = self.bases[tensor]
            part = ids[low - start : high - start]
            if self.offsets is None:
                torch.arange(first + low - self.starts[tensor], first + high - self.starts[tensor], out=part)
            else:
                part.copy_(self.offsets[low:high]).add_(first)
        return ids


def can_be_dense(weight: Tensor, base: int) -> bool:
    """Whether a tensor of which every element is masked may do without offsets.

    Four neighbours then share a Philox block and a 16-byte access: first id, address and size must allow it.
    """
    return base % ALIGN == 0 and weight.numel() % ALIGN == 0 and weight.data_ptr() % 16 == 0


def build_table(weights: Sequence[Tensor], bases: Sequence[int], offsets: Sequence[Tensor] | None) -> ElementTable:
    """The table of some tensors' masked elements.

    Args:
        weights: contiguous tensors of one dtype and device; their memory is what the operations write.
        bases: element id of each tensor's first element.
        offsets: per tensor, int64 [n_i], sorted flat offsets of its masked elements; n_i > 0. None: all elements of
            all tensors, each of which ``can_be_dense``.

    Raises:
        ValueError: if the tensors differ in dtype or device, one is not contiguous, or one cannot be dense.
    """
    device, dtype = weights[0].device, weights[0].dtype
    for weight, base in zip(weights, bases, strict=True):
        if weight.device != device or weight.dtype != dtype:
            raise ValueError(
                f"one table needs one dtype and device; "
                f"got {weight.dtype} on {weight.device} beside {dtype} on {device}"
            )
        if not weight.is_contiguous():
            raise ValueError(f"a weight of shape {tuple(weight.shape)} is not contiguous; call .contiguous() first")
        if offsets is None and not can_be_dense(weight, base):
            raise ValueError(
                f"{weight.numel()} elements at id {base} and address {weight.data_ptr():#x} need offsets: not aligned"
            )
    flat = tuple(w.detach().view(-1) for w in weights)
    counts = tuple(w.numel() for w in flat) if offsets is None else tuple(o.numel() for o in offsets)
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + -(-count // ALIGN) * ALIGN)
    blocks = [
        _blocks_of(w, base, start, count, dense=offsets is None)
        for w, base, start, count in zip(flat, bases, starts, counts, strict=False)
    ]
    return ElementTable(
        weights=flat,
        bases=tuple(bases),
        starts=tuple(starts),
        counts=counts,
        offsets=None if offsets is None else _padded(flat, offsets, starts).to(device),
        blocks=torch.cat(blocks).to(device),
    )


def _padded(weights: Sequence[Tensor], offsets: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    small = max(w.numel() for w in weights) <= _INT32_MAX
    out = torch.zeros(starts[-1], dtype=torch.int32 if small else torch.int64)
    for start, each in zip(starts, offsets, strict=False):
        out[start : start + each.numel()] = each
    return out


def _blocks_of(weight: Tensor, base: int, start: int, count: int, *, dense: bool) -> Tensor:
    first = torch.arange(0, count, BLOCK)
    own = first if dense else torch.zeros_like(first)
    addresses = weight.data_ptr() + own * weight.element_size()
    return torch.stack((addresses, base + own, first + start, (count - first).clamp(max=BLOCK)), dim=1)


__all__ = ["ALIGN", "BLOCK", "ElementTable", "build_table", "can_be_dense"]
