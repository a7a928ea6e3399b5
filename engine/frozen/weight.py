"""``FrozenWeight``: a parameter that is never written, with live values of its masked elements beside it.

To a model it is a parameter like any other: an operation that reads it gets a dense weight, made for this operation from
the stored values, with the live values written in. So a forward pass has the bits of the same model with plain weights.
The dense weight lives as long as the operation: one layer's at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import ModelError
from .points import Points, batch_argument
from .stored import Stored

# What a parameter tells about itself, without its values.
_ABOUT = {
    getattr(Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn", "is_meta",
        "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_nested", "is_mps", "is_xpu", "retains_grad", "itemsize",
        "_backward_hooks", "is_sparse_csr", "is_mkldnn", "nbytes",
    )
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.is_contiguous, Tensor.stride, Tensor.is_inference, Tensor.__len__, Tensor.get_device,
    Tensor.is_signed, Tensor.ndimension, Tensor.is_same_size, torch.is_floating_point, torch.is_complex, torch.numel,
    Tensor.__hash__, torch.is_inference, Tensor.requires_grad.__set__, Tensor.grad.__set__, Tensor.requires_grad_,
    Tensor._backward_hooks.__set__,
}  # fmt: skip


class FrozenWeight(Tensor):
    """A parameter whose values are stored read-only, and whose masked elements have live values beside it.

    Every operation on it computes with the dense weight. What would write it raises ``ModelError``. A copy
    (``copy.deepcopy``) shares the stored values and has live values of its own.

    Args:
        stored: the values.
        dtype: dtype of the dense weight, in which the model computes.
        device: device of the dense weight; the stored values may be on another one.
        points: which point of a perturbation operations compute with; shared by the parameters of a model.

    Attributes:
        stored: as the argument.
        points: as the argument.
        offsets: flat offsets of the masked elements, ascending, int32 or int64 [n] on ``device``; None if there are none.
        values: live values of the masked elements, [n] in ``dtype``; None if there are none.
        second: live values at the second point, [n], where both points are computed in one forward pass; else None.
    """

    stored: Stored
    points: Points
    offsets: Tensor | None
    values: Tensor | None
    second: Tensor | None
    _anchor: Tensor | None

    def __new__(
        cls, stored: Stored, dtype: torch.dtype, device: torch.device, points: Points | None = None
    ) -> "FrozenWeight":
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, stored.shape, dtype=dtype, device=device, requires_grad=False
        )
        self.stored, self.points = stored, points or Points()
        self.offsets = self.values = self.second = self._anchor = None
        self._is_param = True  # for isinstance(_, nn.Parameter), as torch's own subclasses have it
        return self  # type: ignore[no-any-return]

    def dense(self) -> Tensor:
        """Returns the weight as a new plain tensor, with the live values of the masked elements written in."""
        weight = self.stored.dense(self.dtype, self.device)
        if self.offsets is not None:
            weight.view(-1)[self.offsets] = self._live()
        return weight

    def rows(self, index: Tensor) -> Tensor:
        """Returns rows of ``dense()``: [n, columns] for row numbers int64 [n], in the dtype of the weight.

        On a GPU the host waits if the weight has masked elements: their number in these rows is not known before.
        """
        rows = self.stored.rows(index, self.dtype, self.device)
        if self.offsets is None:
            return rows
        columns = self.shape[1]
        low = index.to(self.offsets.dtype) * columns
        first = torch.searchsorted(self.offsets, low)
        counts = torch.searchsorted(self.offsets, low + columns) - first
        at = torch.repeat_interleave(counts)  # the row, once for each of its masked elements
        element = torch.arange(at.numel(), device=at.device) + (first - (counts.cumsum(0) - counts))[at]
        rows[at, (self.offsets[element] - low[at]).long()] = self._live()[element]
        return rows

    def _live(self) -> Tensor:
        values = self.second if self.points.second and self.second is not None else self.values
        assert values is not None
        return values

    def add_masked(self, offsets: Tensor) -> None:
        """Makes new vectors of the masked elements and their live values, with the values that they have now.

        The vectors before belong to nobody then: an optimizer that has written them notices.

        Args:
            offsets: flat offsets, ascending, int64 [n].

        Raises:
            ModelError: if other elements were masked before and have changed: their values would be lost.
        """
        dense = self.stored.dense(self.dtype, self.device).view(-1)
        offsets = offsets.to(self.device, torch.int32 if self.numel() < 2**31 else torch.int64)
        if self.offsets is not None:
            left = ~torch.isin(self.offsets, offsets)
            if not torch.equal(dense[self.offsets[left]], self._live()[left]):
                raise ModelError(
                    "elements of another mask were changed beside this read-only weight, and would be lost; load the "
                    "model again for another mask"
                )
            dense[self.offsets] = self._live()
        self.values, self.offsets, self.second = dense[offsets], offsets, None

    @contextmanager
    def collecting_gradient(self) -> Iterator[Tensor]:
        """Context that yields a leaf tensor of autograd, in the shape of the weight, that gets the weight's gradient."""
        anchor = torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape).requires_grad_()
        self._anchor = anchor
        try:
            yield anchor
        finally:
            self._anchor = None

    def __repr__(self) -> str:  # type: ignore[override]
        masked = 0 if self.offsets is None else self.offsets.numel()
        return (
            f"FrozenWeight({self.stored.format} {tuple(self.shape)} computed in {self.dtype} on {self.device}, "
            f"{masked} masked elements beside it)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenWeight":
        if id(self) not in memo:
            points = memo.setdefault(id(self.points), Points())
            copy = FrozenWeight(self.stored, self.dtype, self.device, points)
            copy.offsets, copy.values = self.offsets, None if self.values is None else self.values.clone()
            memo[id(self)] = copy
        return memo[id(self)]  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Computes an operation with the dense weight in the place of every frozen one."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            _check_stays_frozen(func, args)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        _check_reads_only(func, args, kwargs)
        weights = [value for value in (*args, *kwargs.values()) if isinstance(value, FrozenWeight)]
        if len(weights) == 1 and weights[0].points.both and weights[0].second is not None:
            return _by_halves(func, weights[0], args, kwargs)
        return _compute(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Raises ``ModelError``: nothing may get here without a dense weight."""
        raise ModelError(f"{func} was called on a read-only weight in a way that hides it; use its dense() instead")


def _compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if func is F.linear and isinstance(args[1] if len(args) > 1 else None, FrozenWeight):
        return _linear(args[0], args[1], *[_plain(value) for value in (*args[2:], *kwargs.values())])
    if func is F.embedding and torch.is_tensor(args[0]) and isinstance(args[1], FrozenWeight) and not _differs(args[1]):
        if _is_simple_embedding(args, kwargs):
            return args[1].rows(args[0].reshape(-1)).view(*args[0].shape, args[1].shape[1])
    return func(*tree_map(_plain, tuple(args)), **tree_map(_plain, kwargs))


def _linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() and (weight._anchor is not None or x.requires_grad):
        return _Linear.apply(x, weight._anchor, bias, weight)  # type: ignore[no-any-return]
    return F.linear(x, weight.dense(), bias)


def _differs(weight: FrozenWeight) -> bool:
    """Whether the gradient of a weight is being collected."""
    return weight._anchor is not None and torch.is_grad_enabled()


def _is_simple_embedding(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call looks rows up and does nothing else; the padding index only matters to gradients."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args, strict=False)) | kwargs
    return given.get("max_norm") is None


def _plain(value: Any) -> Any:
    """Replaces a frozen weight by its dense one."""
    if not isinstance(value, FrozenWeight):
        return value
    return _Dense.apply(value._anchor, value) if _differs(value) else value.dense()


def _by_halves(func: Any, weight: FrozenWeight, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Computes an operation at both points: the first half of the batch at the first, the other half at the second."""
    which = batch_argument(func, args, weight)
    halves = args[which].chunk(2)
    if len(halves) != 2 or halves[0].shape != halves[1].shape:
        raise ModelError(f"{func.__name__} got a batch of {args[which].shape[0]}, which has no two halves")
    if func is F.embedding:
        results = []
        for half, second in zip(halves, (False, True), strict=True):
            with weight.points.at(second=second):
                results.append(_compute(func, (half, *args[1:]), kwargs))
        return torch.cat(results)
    dense, results = weight.stored.dense(weight.dtype, weight.device), []  # read and dequantized once
    position = next((i for i, value in enumerate(args) if value is weight), None)
    for half, values in zip(halves, (weight.values, weight.second), strict=True):
        dense.view(-1)[weight.offsets] = values
        own = list(args)
        own[which] = half
        if position is not None:
            own[position] = dense
        results.append(func(*own, **{name: dense if value is weight else value for name, value in kwargs.items()}))
    return torch.cat(results)


_REMEDY = (
    "its stored values are read-only: train its masked elements by zeroth-order steps, or load the model with plain "
    "weights"
)


def _check_stays_frozen(func: Any, args: Sequence[Any]) -> None:
    """Raises ``ModelError`` if a call would make a frozen weight require gradients."""
    sets = func is Tensor.requires_grad_ or func is Tensor.requires_grad.__set__  # type: ignore[attr-defined]
    if sets and (args[1] if len(args) > 1 else True):
        raise ModelError(f"a frozen weight gets no gradient; {_REMEDY}")


def _check_reads_only(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises ``ModelError`` if a call would write a frozen weight: it would write a dense copy, and nobody notice."""
    name = getattr(func, "__name__", "")
    writes = name.endswith("_") and not name.endswith("__")
    writes |= name in ("__set__", "__setitem__", "__delitem__") or (name.startswith("__i") and name not in _NOT_WRITING)
    if func is Tensor.data.__set__ and isinstance(args[0], FrozenWeight):  # type: ignore[attr-defined]
        raise ModelError("a model with frozen weights cannot be moved or cast; load it in its dtype, on its device")
    if (writes and args and isinstance(args[0], FrozenWeight)) or isinstance(kwargs.get("out"), FrozenWeight):
        raise ModelError(f"{name} would write a frozen weight; {_REMEDY}")


_NOT_WRITING = ("__invert__", "__index__", "__int__", "__iter__")


class _Linear(torch.autograd.Function):
    """A linear layer that makes its weight again for the backward pass, instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, bias: Tensor | None, weight: FrozenWeight) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x if anchor is not None else None)
        ctx.weight, ctx.shape = weight, x.shape
        return F.linear(x, weight.dense(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        to_x = (rows @ ctx.weight.dense()).view(ctx.shape) if needs_x else None
        to_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return to_x, to_weight, rows.sum(0) if needs_bias else None, None


class _Dense(torch.autograd.Function):
    """The dense weight, whose gradient goes to the anchor."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weight: FrozenWeight) -> Tensor:  # type: ignore[override]
        return weight.dense()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def frozen_weights(model: nn.Module) -> dict[str, FrozenWeight]:
    """Returns the frozen weights of a model by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if isinstance(p, FrozenWeight)}


__all__ = ["FrozenWeight", "frozen_weights"]
