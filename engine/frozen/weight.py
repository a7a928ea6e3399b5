"""``FrozenWeight``: a parameter that is never written, with live values of its masked elements beside it.

To a model it is a parameter like any other: an operation that reads it gets a dense weight, made for this operation
from the stored values, with the live values written in. So a forward pass has the bits of the same model with plain
weights. The dense weight lives as long as the operation: one layer's at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ModelError
from .correction import Correction
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
    Tensor.__hash__, torch.is_inference, Tensor.requires_grad_,
} | {getattr(Tensor, name).__set__ for name in ("requires_grad", "grad", "_backward_hooks")}  # fmt: skip


class FrozenWeight(Tensor):
    """A parameter whose values are stored read-only, and whose masked elements have live values beside it.

    Every operation on it computes with the dense weight. What would write it raises ``ModelError``. A copy
    (``copy.deepcopy``) shares the stored values and has live values of its own.

    Args:
        stored: the values.
        dtype: dtype of the dense weight, in which the model computes.
        device: device of the dense weight; the stored values may be on another one.
        points: which point of a perturbation operations compute with; shared by the parameters of a model.
        adds: whether the live values are float32, and linear layers add them to their outputs as a sparse correction
            (see ``triton_kernels.correction``), in place of writing them into the dense weight, whose dtype may round
            a perturbation away. Other operations write them, rounded.
        rounds: whether operations read live values rounded to the format of the stored ones, as if the masked weights
            were in it too. For comparison: most perturbations are rounded away.

    Attributes:
        stored: as the argument.
        points: as the argument.
        offsets: flat offsets of the masked elements, ascending, int32 or int64 [n] on ``device``; None if there are
            none.
        values: live values of the masked elements, [n] in ``dtype``, or float32 if it adds; None if there are none.
        second: live values at the second point, [n], where both points are computed in one forward pass; else None.
    """

    stored: Stored
    points: Points
    offsets: Tensor | None
    values: Tensor | None  # type: ignore[assignment]  # torch's method of this name is for sparse tensors
    second: Tensor | None
    adds: bool
    rounds: bool
    _correction: Correction | None
    _anchor: Tensor | None

    def __new__(
        cls,
        stored: Stored,
        dtype: torch.dtype,
        device: torch.device,
        points: Points | None = None,
        *,
        adds: bool = False,
        rounds: bool = False,
    ) -> "FrozenWeight":
        """Makes a parameter; see the class."""
        device = torch.empty(0, dtype=dtype, device=device).device  # with its index, as tensors there have it
        self = Tensor._make_wrapper_subclass(cls, stored.shape, dtype=dtype, device=device, requires_grad=False)
        self.stored, self.points, self.adds, self.rounds = stored, points or Points(), adds, rounds
        self.offsets = self.values = self.second = self._correction = self._anchor = None
        self._is_param = True  # for isinstance(_, nn.Parameter), as torch's own subclasses have it
        return self

    def dense(self) -> Tensor:
        """Returns the weight as a new plain tensor, with the live values of the masked elements written in."""
        weight = self.base()
        if self.offsets is not None:
            weight.view(-1)[self.offsets] = self._live().to(self.dtype)
        return weight

    def base(self) -> Tensor:
        """Returns the stored values as a new plain tensor, in the dtype and on the device of the weight."""
        return self.stored.dense(self.dtype, self.device)

    def correction(self) -> Correction:
        """Returns what adds the live values to the output of a linear layer; made when one is first computed."""
        if self._correction is None:
            assert self.offsets is not None
            base = self.base().view(-1)[self.offsets].float()
            self._correction = Correction(self.offsets, self.shape[1], base)
        return self._correction

    def base_for_linear(self) -> Tensor:
        """Returns the stored values like ``base``, but maybe themselves, if nothing is to be written into them."""
        is_written = self.offsets is not None and not self.adds
        return (self.stored.dense if is_written else self.stored.read)(self.dtype, self.device)

    def has_wide_values(self) -> bool:
        """Whether live values have bits that the dense weight has no room for."""
        if self.values is None or not (self.adds or self.rounds):
            return False
        return not torch.equal(self.values, self._live().to(self.dtype).to(self.values.dtype))

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
        rows[at, (self.offsets[element] - low[at]).long()] = self._live()[element].to(self.dtype)
        return rows

    def _live(self) -> Tensor:
        values = self.second if self.points.second and self.second is not None else self.values
        assert values is not None
        assert self.offsets is not None
        return self.stored.rounded(values, self.offsets) if self.rounds else values

    def beside(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns new vectors for ``offsets`` and ``values`` of elements to mask, with the values that they have now.

        Once they are set, the vectors before belong to nobody: an optimizer that has written them notices.

        Args:
            offsets: flat offsets, ascending, int64 [n].

        Raises:
            ModelError: if other elements were masked before and have changed: their values would be lost.
        """
        base = self.base().view(-1)
        dense = base.float() if self.adds else base
        offsets = offsets.to(self.device, torch.int32 if self.numel() < 2**31 else torch.int64)
        if self.offsets is not None:
            left = ~torch.isin(self.offsets, offsets)
            if not torch.equal(dense[self.offsets[left]], self._live()[left]):
                raise ModelError(
                    "elements of another mask were changed beside this read-only weight, and would be lost; load the "
                    "model again for another mask"
                )
            dense[self.offsets] = self._live()
        return offsets, dense[offsets]

    def set_beside(self, offsets: Tensor, values: Tensor) -> None:
        """Sets the vectors of the masked elements; see ``beside``."""
        self.offsets, self.values, self.second = offsets, values, None
        self._correction = None

    @contextmanager
    def collecting_gradient(self) -> Iterator[Tensor]:
        """Context that yields a leaf of autograd, in the shape of the weight, that gets the weight's gradient."""
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
            copy = FrozenWeight(self.stored, self.dtype, self.device, points, adds=self.adds, rounds=self.rounds)
            copy.offsets, copy.values = self.offsets, None if self.values is None else self.values.clone()
            copy._correction = self._correction
            memo[id(self)] = copy
        return memo[id(self)]  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Computes an operation with the dense weight in the place of every frozen one."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            _check_stays_frozen(func, args, kwargs)
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)  # not returned from here: an interrupt must not skip the exit
            return result  # noqa: RET504
        if args and args[0] is _itself(func, args, kwargs):
            return args[0]
        _check_reads_only(func, args, kwargs)
        weights = [value for value in (*args, *kwargs.values()) if isinstance(value, FrozenWeight)]
        if any(weight.points.both and weight.second is not None for weight in weights):
            return _by_halves(func, weights, args, kwargs)
        return _compute(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Raises ``ModelError``: nothing may get here without a dense weight."""
        raise ModelError(f"{func} was called on a read-only weight in a way that hides it; use its dense() instead")


def _compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if func is functional.linear and isinstance(args[1] if len(args) > 1 else None, FrozenWeight):
        return _linear(args[0], args[1], *[_plain(value) for value in (*args[2:], *kwargs.values())])
    if func is functional.embedding and len(args) > 1 and isinstance(args[1], FrozenWeight) and not _differs(args[1]):
        # what else it may be told only matters to gradients
        return args[1].rows(args[0].reshape(-1)).view(*args[0].shape, args[1].shape[1])
    return func(*tree_map(_plain, tuple(args)), **tree_map(_plain, kwargs))


def _linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() and (weight._anchor is not None or x.requires_grad):
        return _Linear.apply(x, weight._anchor, bias, weight)  # type: ignore[no-any-return]
    return _with_live(x, weight, weight.base_for_linear(), bias)


def _with_live(x: Tensor, weight: FrozenWeight, base: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer from the stored values of its weight, which live values are written into, or added to.

    Args:
        x: the input, [..., columns].
        weight: the weight.
        base: its ``base_for_linear()``.
        bias: the bias, plain.
    """
    if weight.offsets is None:
        return functional.linear(x, base, bias)
    if not weight.adds:
        base.view(-1)[weight.offsets] = weight._live().to(weight.dtype)
        return functional.linear(x, base, bias)
    y = functional.linear(x, base, bias)
    weight.correction().add(x, y, weight._live())
    return y


def _differs(weight: FrozenWeight) -> bool:
    """Whether the gradient of a weight is being collected."""
    return weight._anchor is not None and torch.is_grad_enabled()


def _plain(value: Any) -> Any:
    """Replaces a frozen weight by its dense one."""
    if not isinstance(value, FrozenWeight):
        return value
    return _Dense.apply(value._anchor, value) if _differs(value) else value.dense()


def _by_halves(func: Any, weights: list[FrozenWeight], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Computes an operation at both points: the first half of the batch at the first, the other half at the second."""
    points = weights[0].points
    which = batch_argument(func, args, weights)
    if which >= len(args) or not isinstance(args[which], Tensor):
        raise ModelError(f"{func.__name__} was called with its batch as a keyword")
    halves = args[which].chunk(2)
    if len(halves) != 2 or halves[0].shape != halves[1].shape:
        raise ModelError(f"{func.__name__} got a batch of {args[which].shape[0]}, which has no two halves")
    # A linear layer reads and dequantizes its weight once for both points.
    base = (
        args[1].base_for_linear()
        if func is functional.linear and isinstance(args[-1 if len(args) < 2 else 1], FrozenWeight)
        else None
    )
    results = []
    for half, second in zip(halves, (False, True), strict=True):
        with points.at(second=second):
            if base is None:
                results.append(_compute(func, (*args[:which], half, *args[which + 1 :]), kwargs))
            else:
                rest = [_plain(value) for value in (*args[2:], *kwargs.values())]
                results.append(_with_live(half, args[1], base, *rest))
    return torch.cat(results)


def _itself(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> FrozenWeight | None:
    """The weight whose ``data`` are asked for, or that is moved to where it is; None if a call is neither.

    So what writes the data of a parameter raises, and a model may be moved to its own device.
    """
    weight = args[0]
    if not isinstance(weight, FrozenWeight):
        return None
    if func == Tensor.data.__get__ or (func == Tensor.data.__set__ and args[1] is weight):  # type: ignore[attr-defined]
        return weight
    by_type = len(args) > 1 and isinstance(
        args[1], torch.dtype | Tensor
    )  # to(dtype, non_blocking, copy), or a tensor's
    if func is not Tensor.to or kwargs.get("copy") or any(args[3 if by_type else 4 :]):
        return None
    device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
    stays = device is None or (device.type == weight.device.type and device.index in (None, weight.device.index))
    return weight if stays and dtype in (None, weight.dtype) else None


_REMEDY = (
    "its stored values are read-only: train its masked elements by zeroth-order steps, or load the model with plain "
    "weights"
)


def _check_stays_frozen(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises ``ModelError`` if a call would make a frozen weight require gradients."""
    sets = func in (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
    if sets and (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)):
        raise ModelError(f"a frozen weight gets no gradient; {_REMEDY}")


def _check_reads_only(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises ``ModelError`` if a call would write a frozen weight: it would write a dense copy, and nobody notice."""
    name = getattr(func, "__name__", "")
    writes = name.endswith("_") and not name.endswith("__")
    writes |= name in ("__set__", "__setitem__", "__delitem__") or (name.startswith("__i") and name not in _NOT_WRITING)
    if func == Tensor.data.__set__ and isinstance(args[0], FrozenWeight):  # type: ignore[attr-defined]
        raise ModelError("a model with frozen weights cannot be moved or cast; load it in its dtype, on its device")
    written = [kwargs.get("out")]
    if writes or kwargs.get("inplace"):
        written.append(args[0] if args else next(iter(kwargs.values()), None))
    if (
        func is functional.embedding and (args[3] if len(args) > 3 else kwargs.get("max_norm")) is not None
    ):  # scales rows in place
        written += [*args[1:2], kwargs.get("weight")]
    if any(isinstance(value, FrozenWeight) for value in tree_leaves(written)):
        raise ModelError(f"{name} would write a frozen weight; {_REMEDY}")


_NOT_WRITING = ("__invert__", "__index__", "__int__", "__iter__")


class _Linear(torch.autograd.Function):
    """A linear layer that makes its weight again for the backward pass, instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
        ctx.save_for_backward(x if anchor is not None else None)
        ctx.weight, ctx.shape = weight, x.shape
        return functional.linear(x, weight.dense(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        # of the gradient's dtype: autocast may have computed in another one than that of the weight
        to_x = (rows @ ctx.weight.dense().to(grad.dtype)).view(ctx.shape) if needs_x else None
        to_weight = rows.t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype) if needs_weight else None
        return to_x, to_weight, rows.sum(0) if needs_bias else None, None


class _Dense(torch.autograd.Function):
    """The dense weight, whose gradient goes to the anchor."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weight: FrozenWeight) -> Tensor:
        return weight.dense()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def frozen_weights(model: nn.Module) -> dict[str, FrozenWeight]:
    """Returns the frozen weights of a model by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if isinstance(p, FrozenWeight)}


__all__ = ["FrozenWeight", "frozen_weights"]
