"""``Points``: at which point of a perturbation frozen weights are read: +eps, -eps, or both in one forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ModelError

# Operations that compute the rows of a batch one by one, and the position of the batch among their arguments.
_BATCHED: dict[Any, int] = {
    functional.linear: 0,
    functional.embedding: 0,
    functional.layer_norm: 0,
    functional.rms_norm: 0,
    torch.addmm: 1,
}
_ELEMENTWISE = {"mul", "__mul__", "__rmul__", "multiply", "add", "__add__", "__radd__"}


class Points:
    """The point at which operations read the live values beside frozen weights.

    Attributes:
        second: whether they read the values at the second point.
        both: whether a batch holds the examples twice: the first half is computed at the first point, the other half
            at the second.
    """

    def __init__(self) -> None:
        self.second = self.both = False

    @contextmanager
    def at(self, *, second: bool = False, both: bool = False) -> Iterator[None]:
        """Context in which the attributes have these values."""
        before = self.second, self.both
        self.second, self.both = second, both
        try:
            yield
        finally:
            self.second, self.both = before


def batch_argument(func: Any, args: Sequence[Any], weights: Sequence[Tensor]) -> int:
    """Finds the argument of an operation that holds the batch.

    Raises:
        ModelError: if the operation is none of those that are known to compute the rows of a batch one by one.
    """
    if func in _BATCHED:
        return _BATCHED[func]
    if getattr(func, "__name__", "") in _ELEMENTWISE:
        for i, value in enumerate(args):
            if isinstance(value, Tensor) and all(value is not w and value.dim() > w.dim() for w in weights):
                return i
    raise ModelError(f"{getattr(func, '__name__', func)} cannot be computed at two points in one forward pass")


__all__ = ["Points", "batch_argument"]
