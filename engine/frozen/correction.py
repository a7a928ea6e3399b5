"""``Correction``: adds masked weights to the output of a linear layer whose base weight is read-only."""

from torch import Tensor

from ...triton_kernels import correction_reference


class Correction:
    """The masked elements of one matrix, and the values of its base there.

    Args:
        offsets: flat offsets of the elements, ascending, int32 or int64 [n].
        columns: number of columns of the matrix.
        base: values of the base at the elements, float32 [n].
    """

    def __init__(self, offsets: Tensor, columns: int, base: Tensor) -> None:
        self._rows = correction_reference.correction_rows(offsets, columns)
        self._base, self._correct_ = base, correction_reference.correct_
        if base.is_cuda:
            from ...triton_kernels import correction  # imports triton

            self._correct_ = correction.correct_

    @property
    def nbytes(self) -> int:
        """Number of bytes that it holds."""
        own = (self._rows.rows, self._rows.starts, self._rows.columns, self._base)
        return sum(tensor.nbytes for tensor in own)

    def add(self, x: Tensor, y: Tensor, values: Tensor) -> None:
        """Adds ``x[:, columns] * (values - base)`` to the rows of the output, in float32, rounded once.

        Args:
            x: input of the layer, [..., columns].
            y: its output with the base weight, [..., rows]; contiguous, written.
            values: live values of the elements, float32 [n].
        """
        x = x.reshape(-1, x.shape[-1]).to(y.dtype).contiguous()  # autocast may have another one for the output
        self._correct_(x, y.view(-1, y.shape[-1]), self._rows, values, self._base)


__all__ = ["Correction"]
