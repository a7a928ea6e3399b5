"""Gradients of chosen parameters, each handed over as backpropagation delivers it and freed: never all at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MaskError
from .parameters import floating_parameters

LossFunction = Callable[[nn.Module, Any], Tensor]
# Takes the gradient of one parameter, of its shape and dtype; called once a backward pass.
Receiver = Callable[[Tensor], None]


@contextmanager
def stream_gradients(model: nn.Module, receivers: Mapping[str, Receiver]) -> Iterator[None]:
    """Within this context a backward pass gives each named parameter's gradient to its receiver, and keeps none.

    Args:
        model: no other parameter of it gets a gradient meanwhile. Afterwards ``requires_grad`` and ``grad`` are as
            they were.
        receivers: by parameter name, as in ``model.named_parameters()``.
    """
    named = list(floating_parameters(model))
    before = [(p.requires_grad, p.grad) for _, p in named]
    hooks = []
    try:
        for name, parameter in named:
            parameter.requires_grad_(name in receivers)
            if name in receivers:
                parameter.grad = None
                hooks.append(parameter.register_post_accumulate_grad_hook(_hook(receivers[name])))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for (_, parameter), (requires_grad, grad) in zip(named, before, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _hook(receive: Receiver) -> Callable[[Tensor], None]:
    def deliver(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        receive(gradient.detach())

    return deliver


def stream_batch_gradients(
    model: nn.Module, batches: Iterable[Any], loss: LossFunction | None, receivers: Mapping[str, Receiver]
) -> int:
    """Gives the gradient on each calibration batch to the receivers.

    Args:
        model: run in evaluation mode; left as it was (mode, ``requires_grad``, ``grad``).
        batches: what ``loss`` takes, at least one.
        loss: of the model on one batch, a scalar; None is the language-model loss of a transformers causal LM.
        receivers: see ``stream_gradients``.

    Returns:
        The number of batches.

    Raises:
        MaskError: if there is no batch, a loss is not finite, or does not depend on any of the parameters.
    """
    if loss is None:
        from .lm.objective import language_model_loss  # transformers is imported only where it is needed

        loss = language_model_loss
    training = model.training
    count = 0
    try:
        model.eval()
        with stream_gradients(model, receivers), torch.enable_grad():
            for batch in batches:
                value = loss(model, batch)
                if not torch.isfinite(value):
                    raise MaskError(f"the loss on calibration batch {count} is {value.item()}; a finite one is needed")
                if not value.requires_grad:
                    raise MaskError(f"the loss on calibration batch {count} does not depend on the chosen parameters")
                value.backward()
                count += 1
    finally:
        model.train(training)
    if count == 0:
        raise MaskError("no calibration batch was given; gradients need at least one")
    return count


__all__ = ["LossFunction", "Receiver", "stream_batch_gradients", "stream_gradients"]
