"""``Stored``: a matrix of weights as it is kept: plain, in few bits, in a file, or on another device."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class Stored(ABC):
    """The read-only values of one parameter.

    Attributes:
        shape: shape of the parameter.
        format: name of the format, for people: "bfloat16", "nf4".
    """

    shape: torch.Size
    format: str

    @abstractmethod
    def dense(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns the values in a new tensor, ``dtype`` ``shape`` on ``device``, contiguous; it may be written."""

    def read(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns the values like ``dense``, but maybe in the stored tensor itself: the caller must not write it."""
        return self.dense(dtype, device)

    @abstractmethod
    def to(self, device: torch.device) -> "Stored":
        """Returns the same values on a device: this object if they are there."""

    @abstractmethod
    def pinned(self) -> "Stored":
        """Returns the same values in pinned memory of the host, from which a GPU copies without waiting."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors in which the values are kept."""

    def rows(self, index: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns rows of a matrix in a new tensor: ``dtype`` [n, columns] on ``device``.

        Args:
            index: numbers of the rows, int64 [n] on ``device``.
            dtype: dtype of the result.
            device: device of the result.

        Raises:
            IndexError: if there is no such row.
        """
        return functional.embedding(index, self.dense(dtype, device))

    def rounded(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Rounds values of elements to those that the format has at their places, if it is int8.

        Args:
            values: float32 [n].
            offsets: flat offsets of the elements, int32 or int64 [n].
        """
        return values

    @property
    def nbytes(self) -> int:
        """Number of bytes of the values."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)


class PlainStored(Stored):
    """Plain numbers: float32, bfloat16 or float16, in memory or mapped from a file, on any device.

    A cast to a wider dtype is exact, so a checkpoint in bfloat16 takes two bytes a weight and computes in float32.

    Args:
        values: the values, never written; copied if they are not contiguous.
    """

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape = values.detach().contiguous(), values.shape
        self.format = str(values.dtype).removeprefix("torch.")

    def to(self, device: torch.device) -> Stored:
        """See ``Stored``."""
        return self if self.values.device == device else PlainStored(self.values.to(device))

    def pinned(self) -> Stored:
        """See ``Stored``."""
        return PlainStored(self.values.pin_memory())

    def read(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See ``Stored``."""
        is_dense = self.values.dtype == dtype and self.values.device == device
        return self.values if is_dense else self.dense(dtype, device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See ``Stored``."""
        return (self.values,)

    def dense(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See ``Stored``."""
        there = self.values.to(device, non_blocking=True)  # fewer bytes cross before the cast
        return there.to(dtype, copy=there is self.values)

    def rows(self, index: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See ``Stored``."""
        return functional.embedding(index.to(self.values.device), self.values).to(device).to(dtype)


def moved(value: Any, device: torch.device) -> Any:
    """Returns a tensor on a device, without a copy if it is there."""
    return value if value.device == device else value.to(device, non_blocking=True)


__all__ = ["PlainStored", "Stored", "moved"]
