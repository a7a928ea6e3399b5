"""Reads and writes masked weights on a CPU, compiled by numba: one call for all tensors of a table, by their addresses.

torch needs a call for each tensor, which takes longer than the few values that a sparse mask has in it. The compiled
functions take addresses too, because arrays as arguments would take longer than the loops over a small mask.
"""

import numba
from numba import int16, int32, int64, types, void
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from .elements import ElementTable, Layout


@intrinsic
def _pointer(typing_context, address, element):
    """The address as a pointer to elements of the type ``element``."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(element.dtype)(address, element), generate


# Arguments: addresses of ``Window.rows``, their number, addresses of the offsets (int32) and of the values.
_SIGNATURE = void(int64, int64, int64, int64)


@numba.njit(_SIGNATURE, nogil=True, cache=True)
def _scatter_4_bytes(rows, n, offsets, values):
    rows, offsets, values = _pointer(rows, int64), _pointer(offsets, int32), _pointer(values, int32)
    for row in range(0, 3 * n, 3):
        weights = _pointer(rows[row], int32)
        for slot in range(rows[row + 1], rows[row + 1] + rows[row + 2]):
            weights[offsets[slot]] = values[slot]


@numba.njit(_SIGNATURE, nogil=True, cache=True)
def _scatter_2_bytes(rows, n, offsets, values):
    rows, offsets, values = _pointer(rows, int64), _pointer(offsets, int32), _pointer(values, int16)
    for row in range(0, 3 * n, 3):
        weights = _pointer(rows[row], int16)
        for slot in range(rows[row + 1], rows[row + 1] + rows[row + 2]):
            weights[offsets[slot]] = values[slot]


@numba.njit(_SIGNATURE, nogil=True, cache=True)
def _gather_4_bytes(rows, n, offsets, values):
    rows, offsets, values = _pointer(rows, int64), _pointer(offsets, int32), _pointer(values, int32)
    for row in range(0, 3 * n, 3):
        weights = _pointer(rows[row], int32)
        for slot in range(rows[row + 1], rows[row + 1] + rows[row + 2]):
            values[slot] = weights[offsets[slot]]


@numba.njit(_SIGNATURE, nogil=True, cache=True)
def _gather_2_bytes(rows, n, offsets, values):
    rows, offsets, values = _pointer(rows, int64), _pointer(offsets, int32), _pointer(values, int16)
    for row in range(0, 3 * n, 3):
        weights = _pointer(rows[row], int16)
        for slot in range(rows[row + 1], rows[row + 1] + rows[row + 2]):
            values[slot] = weights[offsets[slot]]


def scatter_(table: ElementTable, start: int, values: Tensor) -> None:
    """Writes values of slots ``start`` onwards to the live weights; see ``reference.scatter_``."""
    if not _is_compiled_for(table):
        reference.scatter_(table, start, values)
        return
    window, values = table.window(start, start + values.numel()), values.contiguous()
    compiled = _scatter_4_bytes if values.element_size() == 4 else _scatter_2_bytes
    compiled(window.rows.data_ptr(), len(window.weights), _offsets(table, start), values.data_ptr())
    increment_version(window.weights)  # so that autograd notices, as it does when torch writes


def gather(table: ElementTable, start: int, out: Tensor) -> None:
    """Reads the live weights of slots ``start`` onwards; see ``reference.gather``."""
    if not _is_compiled_for(table):
        reference.gather(table, start, out)
        return
    assert out.is_contiguous()
    window = table.window(start, start + out.numel())
    compiled = _gather_4_bytes if out.element_size() == 4 else _gather_2_bytes
    compiled(window.rows.data_ptr(), len(window.weights), _offsets(table, start), out.data_ptr())


def _is_compiled_for(table: ElementTable) -> bool:
    """Whether it is not for torch: other weights are contiguous, and int64 offsets are of huge tensors."""
    return table.layout is Layout.SCATTERED and table.offsets is not None and table.offsets.element_size() == 4


def _offsets(table: ElementTable, start: int) -> int:
    """Address of the offset of slot ``start``."""
    assert table.offsets is not None
    return table.offsets.data_ptr() + 4 * start


__all__ = ["gather", "scatter_"]
