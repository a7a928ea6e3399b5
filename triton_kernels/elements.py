"""``ElementTable``: memory locations of a model's masked elements, for the kernels and the reference.

One table covers the masked elements of all tensors of one dtype on one device, so that an operation is one launch.
Each element has a slot: its index in ``offsets`` and in the masters. The slots of a tensor start at a multiple of 4, so
that four neighbours are one 16-byte load. Up to three padding slots after a tensor hold no element; no weight is
written for them.

The slots are cut into blocks of at most ``BLOCK``; a block never spans two tensors. A program processes one block and
reads its four numbers once. The element id of a slot is ``base + offset``. Its weight is at ``address + offset *
itemsize`` of its tensor, or, where masked weights are kept beside their tensors, next to its neighbours' (``Layout``).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

BLOCK = 1024
ALIGN = 4
_INT32_MAX = 2**31 - 1


class Layout(IntEnum):
    """Where the weights of a table's elements are.

    ``SCATTERED``: in tensors that have other elements too, at their offsets.
    ``COMPACT``: in vectors of the masked elements alone, in the order of their offsets.
    ``DENSE``: in tensors of which all elements are masked. There are no offsets.
    """

    SCATTERED = 0
    COMPACT = 1
    DENSE = 2


@dataclass(frozen=True, kw_only=True)
class Window:
    """The part of a table in a range of slots, cut by tensors.

    Args:
        weights: flat views of the tensors that have elements there; unless scattered, only of these elements.
        sizes: numbers of slots between elements, of the first tensor's elements, between elements, and so on.
        counts: int64 [len(sizes)], the same on the table's device.
        bases: int64 [len(sizes)], element id of the first element of the elements' tensor, 0 between elements.
        rows: one row per tensor, int64 [n, 3] on the CPU: address in ``weights``, first slot in the range, number of
            elements.
    """

    weights: tuple[Tensor, ...]
    sizes: list[int]
    counts: Tensor
    bases: Tensor
    rows: Tensor

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Cuts values of all slots, [sum(sizes)], into views of each tensor's elements."""
        return values.split(self.sizes)[1::2]


@dataclass(frozen=True, kw_only=True)
class ElementTable:
    """Locations of the masked elements of several tensors: tensor by tensor, in the order of their offsets.

    Args:
        layout: where the weights of the elements are.
        weights: flat views (one dimension, contiguous) of the live tensors, all of one dtype and device. If compact,
            vectors of the masked elements alone.
        bases: element id of each tensor's first element.
        starts: first slot of each tensor, a multiple of ``ALIGN``, followed by one last entry: ``slots``.
        counts: number of masked elements of each tensor.
        offsets: flat offset of each slot's element in its tensor, int32 [slots] (int64 if a tensor has over 2**31
            elements). None if dense.
        blocks: one row per block, int64 [n_blocks, 4]: address of the tensor, its base id, first slot, number of
            elements (<= ``BLOCK``). Unless scattered, the address is that of the block's first element; if dense, so is
            the id.
    """

    layout: Layout
    weights: tuple[Tensor, ...]
    bases: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    offsets: Tensor | None
    blocks: Tensor
    _windows: dict[tuple[int, int], Window] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def nnz(self) -> int:
        """Number of masked elements."""
        return sum(self.counts)

    @property
    def slots(self) -> int:
        """Number of slots, padding included: the length of the masters."""
        return self.starts[-1]

    def tensor_slices(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Finds the slots in ``[start, stop)`` that hold elements: yields (tensor, low, high) for each tensor.

        ``tensor`` is the index of the tensor; its elements in the range are in the slots ``[low, high)``.
        """
        for tensor in range(bisect_right(self.starts, start) - 1, len(self.counts)):
            low, high = self.starts[tensor], self.starts[tensor] + self.counts[tensor]
            if low >= stop:
                return
            if max(low, start) < min(high, stop):
                yield tensor, max(low, start), min(high, stop)

    def ids(self, start: int, stop: int) -> Tensor:
        """Computes the element ids of the slots ``[start, stop)``: int64 [stop - start], 0 in padding slots."""
        if self.offsets is not None:
            window = self.window(start, stop)
            bases = torch.repeat_interleave(window.bases, window.counts, output_size=stop - start)
            return bases + self.offsets[start:stop]  # an offset in padding is 0
        ids = torch.zeros(stop - start, dtype=torch.int64, device=self.blocks.device)
        for tensor, low, high in self.tensor_slices(start, stop):
            first = self.bases[tensor]
            part = ids[low - start : high - start]
            torch.arange(first + low - self.starts[tensor], first + high - self.starts[tensor], out=part)
        return ids

    def window(self, start: int, stop: int) -> Window:
        """The slots ``[start, stop)`` cut by tensors. It is kept: call this for few ranges."""
        if (start, stop) not in self._windows:
            weights, sizes, bases, rows, end = [], [], [], [], start
            for tensor, low, high in self.tensor_slices(start, stop):
                weight, first = self.weights[tensor], self.starts[tensor]
                weights.append(weight if self.layout is Layout.SCATTERED else weight[low - first : high - first])
                sizes += [low - end, high - low]
                bases += [0, self.bases[tensor]]
                rows.append((weights[-1].data_ptr(), low - start, high - low))
                end = high
            sizes, bases, device = [*sizes, stop - end], [*bases, 0], self.blocks.device
            self._windows[start, stop] = Window(
                weights=tuple(weights),
                sizes=sizes,
                counts=torch.tensor(sizes, dtype=torch.int64, device=device),
                bases=torch.tensor(bases, dtype=torch.int64, device=device),
                rows=torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 3),
            )
        return self._windows[start, stop]


def can_be_dense(weight: Tensor, base: int) -> bool:
    """Whether a tensor whose elements are all masked can be in a table without offsets.

    Without offsets, four neighbours share a Philox block and a 16-byte access, so the id of the first element, the
    address and the size must be aligned.

    Args:
        weight: the tensor.
        base: element id of its first element.
    """
    return base % ALIGN == 0 and weight.numel() % ALIGN == 0 and weight.data_ptr() % 16 == 0


def build_table(
    weights: Sequence[Tensor], bases: Sequence[int], offsets: Sequence[Tensor] | None, *, compact: bool = False
) -> ElementTable:
    """Builds the table of the masked elements of tensors.

    Args:
        weights: contiguous tensors of one dtype and device. The operations write to their memory.
        bases: element id of each tensor's first element.
        offsets: sorted flat offsets of each tensor's masked elements, int64 [n_i] with n_i > 0. None selects all
            elements of all tensors; then ``can_be_dense`` must hold for each tensor.
        compact: whether ``weights`` are vectors of the masked elements alone, [n_i] each.

    Raises:
        ValueError: if the tensors differ in dtype or device, one is not contiguous, one cannot be dense, or a compact
            one has another length than its offsets.
    """
    layout = Layout.DENSE if offsets is None else Layout.COMPACT if compact else Layout.SCATTERED
    device, dtype = weights[0].device, weights[0].dtype
    for weight, base in zip(weights, bases, strict=True):
        if weight.device != device or weight.dtype != dtype:
            raise ValueError(
                f"one table needs one dtype and device; got {weight.dtype} on {weight.device} and {dtype} on {device}"
            )
        if not weight.is_contiguous():
            raise ValueError(f"a weight of shape {tuple(weight.shape)} is not contiguous; call .contiguous() first")
        if offsets is None and not can_be_dense(weight, base):
            raise ValueError(
                f"a tensor of {weight.numel()} elements with first id {base} at address {weight.data_ptr():#x} is not "
                f"aligned: its elements need offsets"
            )
    if compact and [w.numel() for w in weights] != [o.numel() for o in offsets or ()]:
        raise ValueError("compact weights need one element for each offset")
    flat = tuple(w.detach().view(-1) for w in weights)
    counts = tuple(w.numel() for w in flat) if offsets is None else tuple(o.numel() for o in offsets)
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + -(-count // ALIGN) * ALIGN)
    blocks = [
        _block_rows(w, base, start, count, layout)
        for w, base, start, count in zip(flat, bases, starts, counts, strict=False)
    ]
    return ElementTable(
        layout=layout,
        weights=flat,
        bases=tuple(bases),
        starts=tuple(starts),
        counts=counts,
        offsets=None if offsets is None else _padded_offsets(offsets, starts).to(device),
        blocks=torch.cat(blocks).to(device),
    )


def _padded_offsets(offsets: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """Concatenates the offsets of all tensors, padded to their slots: int32 or int64 [slots]."""
    fits_int32 = max(int(o[-1]) for o in offsets) <= _INT32_MAX
    padded = torch.zeros(starts[-1], dtype=torch.int32 if fits_int32 else torch.int64, device="cpu")
    for start, tensor_offsets in zip(starts, offsets, strict=False):
        padded[start : start + tensor_offsets.numel()] = tensor_offsets
    return padded


def _block_rows(weight: Tensor, base: int, start: int, count: int, layout: Layout) -> Tensor:
    """Makes the rows of ``ElementTable.blocks`` for one tensor whose ``count`` elements start at slot ``start``."""
    first = torch.arange(0, count, BLOCK, device="cpu")  # first element of each block, counted within the tensor
    none = torch.zeros_like(first)
    addresses = weight.data_ptr() + (none if layout is Layout.SCATTERED else first) * weight.element_size()
    ids = base + (first if layout is Layout.DENSE else none)
    return torch.stack((addresses, ids, first + start, (count - first).clamp(max=BLOCK)), dim=1)


__all__ = ["ALIGN", "BLOCK", "ElementTable", "Layout", "build_table", "can_be_dense"]
