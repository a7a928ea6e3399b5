"""Gradients of chosen parameters, processed and freed one by one as backpropagation produces them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MaskError
from .parameters import floating_parameters

# Computes a model's loss on one batch, a scalar.
LossFunction = Callable[[nn.Module, Any], Tensor]
# Receives the gradient of one parameter, in its shape and dtype. Called once per backward pass.
Receiver = Callable[[Tensor], None]


@contextmanager
def stream_gradients(model: nn.Module, receivers: Mapping[str, Receiver]) -> Iterator[None]:
    """Context in which a backward pass hands each gradient to its parameter's receiver and frees it.

    Args:
        model: the model. Parameters without a receiver get no gradient in this context. On exit ``requires_grad`` and
            ``grad`` of all parameters are restored.
        receivers: receiver by parameter name, as in ``model.named_parameters()``.
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
    """Computes the gradient on each calibration batch and hands it to the receivers.

    Args:
        model: the model, run in evaluation mode. Mode, ``requires_grad`` and ``grad`` are restored.
        batches: inputs of ``loss``, at least one.
        loss: computes the model's loss on one batch, a scalar. None uses the language-model loss of a transformers
            causal LM.
        receivers: receiver by parameter name; see ``stream_gradients``.

    Returns:
        The number of batches.

    Raises:
        MaskError: if there is no batch, or a loss is not finite or does not depend on any parameter with a receiver.
    """
    if loss is None:
        from .lm.objective import language_model_loss  # deferred: it imports transformers

        loss = language_model_loss
    training = model.training
    count = 0
    try:
        model.eval()
        with stream_gradients(model, receivers), torch.enable_grad():
            for batch in batches:
                value = loss(model, batch)
                if not torch.isfinite(value):
                    raise MaskError(f"the loss on calibration batch {count} is {value.item()}; it must be finite")
                if not value.requires_grad:
                    raise MaskError(f"the loss on calibration batch {count} does not depend on the chosen parameters")
                value.backward()
                count += 1
    finally:
        model.train(training)
    if count == 0:
        raise MaskError("no calibration batch was given; at least one is needed to compute gradients")
    return count


__all__ = ["LossFunction", "Receiver", "stream_batch_gradients", "stream_gradients"]
