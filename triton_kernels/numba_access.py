"""Reads and writes masked weights on a CPU, compiled by numba: one call for all tensors of a table, by their addresses.

torch needs a call for each tensor, which takes longer than the few values that a sparse mask has in it.
"""

from typing import Any

import numba
import torch
from numba import int16, int32, int64, types, void
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from .elements import ElementTable

_INTEGERS = {2: torch.int16, 4: torch.int32}


@intrinsic
def _pointer(typing_context, address, like):
    """The address as a pointer to elements of the array ``like``."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), generate


_SIGNATURES = [void(int64[:, ::1], offset[::1], bits[::1]) for offset in (int32, int64) for bits in (int16, int32)]


@numba.njit(_SIGNATURES, nogil=True, cache=True)
def _scatter(rows, offsets, values):
    for row in range(rows.shape[0]):
        weights = _pointer(rows[row, 0], values)
        for slot in range(rows[row, 1], rows[row, 1] + rows[row, 2]):
            weights[offsets[slot]] = values[slot]


@numba.njit(_SIGNATURES, nogil=True, cache=True)
def _gather(rows, offsets, out):
    for row in range(rows.shape[0]):
        weights = _pointer(rows[row, 0], out)
        for slot in range(rows[row, 1], rows[row, 1] + rows[row, 2]):
            out[slot] = weights[offsets[slot]]


def scatter_(table: ElementTable, start: int, values: Tensor) -> None:
    """Writes values of slots ``start`` onwards to the live weights; see ``reference.scatter_``."""
    if table.offsets is None:  # contiguous
        reference.scatter_(table, start, values)
        return
    stop = start + values.numel()
    window = table.window(start, stop)
    _scatter(window.rows.numpy(), table.offsets.numpy()[start:stop], _bits(values))
    increment_version(window.weights)  # so that autograd notices, as it does when torch writes


def gather(table: ElementTable, start: int, out: Tensor) -> None:
    """Reads the live weights of slots ``start`` onwards; see ``reference.gather``."""
    if table.offsets is None:
        reference.gather(table, start, out)
        return
    stop = start + out.numel()
    _gather(table.window(start, stop).rows.numpy(), table.offsets.numpy()[start:stop], _bits(out))


def _bits(values: Tensor) -> Any:
    """The memory of contiguous values of 2 or 4 bytes, as an array of integers."""
    return values.view(_INTEGERS[values.element_size()]).numpy()


__all__ = ["gather", "scatter_"]
