"""``BothPoints``: losses at +eps and at -eps from one pass through the model, which reads its weights once.

The batch is computed twice, side by side: the first half of it at +eps, the other half at -eps. Only live values beside
frozen weights differ between the points, so each layer's weight is read, moved and dequantized once for both. The part
outside of the decoder (the output head on the positions that are scored) is computed at each point by itself.

This pays where reading the weights takes longer than multiplying with them: few tokens, weights in few bits, or weights
that come from another memory.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import ConfigError, ModelError
from .frozen.weight import FrozenWeight, frozen_weights
from .weights import MaskedWeights

# Number of token positions of a forward pass up to which one pass for both points takes less time than two; see
# docs/large-models.md for what was measured.
_PAYS_UP_TO = {"cpu": 128, "cuda": 256}
_AMPLIFIED = 64.0  # the check sets the points this many times further apart, so that a mistake stands out of rounding


class PointsMode(StrEnum):
    """How the losses at the two points of a step are computed.

    ``AUTO``: in one forward pass where that saves time and the model allows it, else in two. ``SEPARATE``: in two.
    ``TOGETHER``: in one.
    """

    AUTO = "auto"
    SEPARATE = "separate"
    TOGETHER = "together"


def check_points_mode(points: str) -> PointsMode:
    """Returns the member with this name; raises ``ValueError`` listing the names if there is none."""
    if points not in list(PointsMode):
        raise ValueError(f"unknown choice points={points!r}; known: {', '.join(PointsMode)}")
    return PointsMode(points)


@dataclass
class _Call:
    """A call of the decoder at the first point.

    Args:
        inputs: the tensors that it got.
        result: its result at the second point, which waits for the call there; None: it is computed there.
    """

    inputs: list[Tensor]
    result: Any


class BothPoints:
    """Computes the loss of a closure at both points.

    The closure calls the model as usual, in the same way at both points. At the first one the decoder computes the
    batch twice; at the second it returns what it computed for that point.

    Args:
        model: a transformers causal LM.
        weights: its masked weights, all of frozen parameters.
        mode: ``TOGETHER``, or ``AUTO``.

    Attributes:
        reason: why the points are computed separately, the latest reason; None if there was none.

    Raises:
        ConfigError: if a masked parameter is not frozen.
        ModelError: if the model is no causal LM of transformers.
    """

    def __init__(self, model: nn.Module, weights: MaskedWeights, mode: PointsMode) -> None:
        frozen = frozen_weights(model)
        plain = [name for name in weights.names() if name not in frozen]
        if plain:
            raise ConfigError(
                f"both points in one forward pass need all masked weights beside frozen ones, and {plain[0]!r} is "
                f"plain; load the model with --quantize, or compute the points separately"
            )
        from .lm.causal import causal_lm  # imports transformers

        self._decoder = cast(nn.Module, cast(Any, causal_lm(model)).get_decoder())
        self._weights: list[FrozenWeight] = [frozen[name] for name in weights.names()]
        self._points = self._weights[0].points
        for weight in frozen.values():  # a copied layer has others
            weight.points = self._points
        self._is_streamed = any(stored_elsewhere(weight) for weight in frozen.values())
        self._mode, self.reason = mode, cast("str | None", None)
        self._is_checked = False
        self._calls: deque[_Call] = deque()

    def keep_second(self) -> None:
        """Makes the live values, as they are now, those of the second point."""
        for weight in self._weights:
            assert weight.values is not None
            weight.second = weight.values.clone()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Context in which a closure computes its loss at the first point, the live values' as they are now."""
        self._calls.clear()
        with self._calling(self._at_first):
            yield

    @contextmanager
    def second(self) -> Iterator[None]:
        """Context in which the closure computes its loss at the second point."""
        with self._points.at(second=True), self._calling(self._at_second):
            yield
        left = [call for call in self._calls if call.result is not None]
        self._calls.clear()
        if left:
            raise ModelError(
                "the closure called the model less often at -eps than at +eps; compute the points separately"
            )

    def forget(self) -> None:
        """Frees the values of the second point."""
        self._calls.clear()
        for weight in self._weights:
            weight.second = None

    @contextmanager
    def _calling(self, forward: Any) -> Iterator[None]:
        """Context in which the decoder's forward is another function."""
        had, own = "forward" in vars(self._decoder), vars(self._decoder).get("forward")
        self._forward = self._decoder.forward
        try:
            self._decoder.forward = forward
            yield
        finally:
            if had:
                self._decoder.forward = own  # type: ignore[assignment]
            else:
                vars(self._decoder).pop("forward", None)

    def _at_first(self, *args: Any, **kwargs: Any) -> Any:
        inputs, tensors = _inputs(args, kwargs), _tensors(args, kwargs)
        if self._pays(inputs) and self._check(inputs, args, kwargs):
            first, second = self._both(inputs, args, kwargs)
            self._calls.append(_Call(tensors, second))
            return first
        self._calls.append(_Call(tensors, None))
        return self._forward(*args, **kwargs)

    def _at_second(self, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.popleft() if self._calls else None
        if call is None or call.result is None:
            return self._forward(*args, **kwargs)
        if not _are_equal(_tensors(args, kwargs), call.inputs):
            raise ModelError("the closure computed another batch at -eps than at +eps")
        return call.result

    def _pays(self, inputs: Tensor) -> bool:
        """Whether to compute a batch at both points in one pass."""
        if self._mode is PointsMode.TOGETHER:
            return True
        positions = inputs.shape[0] * inputs.shape[1]
        return self.reason is None and (self._is_streamed or positions <= _PAYS_UP_TO.get(inputs.device.type, 0))

    def _both(self, inputs: Tensor, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Computes the decoder on a batch at both points: its outputs at the first and at the second."""
        rows = inputs.shape[0]
        doubled = [_twice(value, rows) for value in args], {name: _twice(value, rows) for name, value in kwargs.items()}
        with self._points.at(both=True):
            out = self._forward(*doubled[0], **doubled[1])
        return _half(out, rows, 0), _half(out, rows, 1)

    def _check(self, inputs: Tensor, args: Any, kwargs: dict[str, Any]) -> bool:
        """Compares, once, both points in one pass with each by itself.

        Raises:
            ModelError: if they differ, unless the mode is ``AUTO``.
        """
        if self._is_checked:
            return True
        second = [weight.second for weight in self._weights]
        try:
            for weight in self._weights:
                assert weight.values is not None
                assert weight.second is not None
                weight.second = torch.lerp(weight.values, weight.second, _AMPLIFIED)
            try:
                together = self._both(inputs, args, kwargs)
                apart = []
                for is_second in (False, True):
                    with self._points.at(second=is_second):
                        apart.append(self._forward(*args, **kwargs))
                hidden = [_hidden(out) for out in apart]
                if not all(bool(states.isfinite().all()) for states in hidden):
                    return False  # nothing can be compared on this batch: it is computed at each point by itself
                problem = _difference([_hidden(out) for out in together], hidden)
            except ModelError as error:
                problem = str(error)
        finally:
            for weight, values in zip(self._weights, second, strict=True):
                weight.second = values
        if problem is None:
            self._is_checked = True
            return True
        self.reason = f"the two points of a step are computed separately: {problem}"
        if self._mode is PointsMode.TOGETHER:
            raise ModelError(f"the two points of a step cannot be computed in one forward pass: {problem}")
        return False


def stored_elsewhere(weight: FrozenWeight) -> bool:
    """Whether the values of a frozen weight are on another device than the one that computes."""
    return any(tensor.device != weight.device for tensor in weight.stored.tensors)


def _inputs(args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The token ids, or embeddings, that a decoder is called with."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(value, Tensor):
            return value
    raise ModelError("the decoder was called without input_ids and inputs_embeds")


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]


def _are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b or torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _twice(value: Any, rows: int) -> Any:
    """Repeats the tensors that have a row for each row of the batch, and positions that are the same for all rows."""
    if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == 1 and not value.is_floating_point():
        value = value.expand(rows, -1)
    if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == rows:
        return torch.cat((value, value))
    if isinstance(value, dict):
        return {key: _twice(entry, rows) for key, entry in value.items()}
    return value


def _half(out: Any, rows: int, half: int) -> Any:
    """One half of a decoder's output, by rows.

    Raises:
        ModelError: if the output has something else in it than hidden states.
    """
    if not hasattr(out, "last_hidden_state"):
        raise ModelError(f"its decoder returns a {type(out).__name__}, not transformers' output")
    entries = {name: value for name, value in out.items() if value is not None}
    extra = sorted(entries.keys() - {"last_hidden_state", "past_key_values"})
    if extra or "last_hidden_state" not in entries:
        raise ModelError(f"its decoder returns {', '.join(extra) or 'no hidden states'}")
    return type(out)(last_hidden_state=entries["last_hidden_state"][half * rows : (half + 1) * rows])


def _hidden(out: Any) -> Tensor:
    return out.last_hidden_state  # type: ignore[no-any-return]


def _difference(together: list[Tensor], apart: list[Tensor]) -> str | None:
    """Says how hidden states at two points, computed together, differ from those computed apart; None if they do not.

    They may differ as rounding differs with the size of a batch, and by far less than the two points do.
    """
    between = float((apart[0] - apart[1]).abs().max())
    rounding = 8 * torch.finfo(apart[0].dtype).eps * float(apart[0].abs().max())
    largest = max(float((a - b).abs().max()) for a, b in zip(together, apart, strict=True))
    if largest <= max(0.02 * between, min(rounding, 0.25 * between)):
        return None
    return f"the hidden states differ by {largest:.3g} from those computed separately, the points by {between:.3g}"


__all__ = ["BothPoints", "PointsMode", "check_points_mode", "stored_elsewhere"]
