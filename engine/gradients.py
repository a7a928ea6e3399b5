"""Gradients of chosen parameters, processed and freed one by one as backpropagation produces them.

Nothing of the model is changed, and no hook that is registered on a parameter runs: not a user's optimizer that steps
in the backward pass, and no hook that changes gradients. The gradients are those of the loss.
"""

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MaskError
from .frozen.weight import FrozenWeight
from .parameters import check_values, floating_parameters

# Computes a model's loss on one batch, a scalar.
LossFunction = Callable[[nn.Module, Any], Tensor]
# Receives the gradient of one parameter, dense, in its shape and dtype. Called at most once per backward pass.
Receiver = Callable[[Tensor], None]
# Backpropagates from a loss.
Backward = Callable[[Tensor], None]


@contextmanager
def stream_gradients(
    model: nn.Module, receivers: Mapping[str, Receiver], *, among: Collection[str] = ()
) -> Iterator[Backward]:
    """Context that yields a backward pass which hands each gradient to its parameter's receiver and frees it.

    In the context autograd is enabled, and only parameters with a receiver, or in ``among``, require gradients. A
    frozen parameter gets the gradient of its dense weight, which is made again in the backward pass. The backward pass
    leaves every ``grad`` as it is and runs none of the parameters' hooks. It cannot go through a checkpoint with
    ``use_reentrant=True``, nor work in inference mode.

    Args:
        model: the model. On exit ``requires_grad`` and the hooks of all parameters are restored.
        receivers: receiver by parameter name, as in ``model.named_parameters()``. A parameter that the loss does not
            depend on gets no call.
        among: names of plain parameters that require gradients too, which are not computed.

    Raises:
        ModelError: if a parameter with a receiver has no values that can be differentiated; see
            ``parameters.check_values``.
    """
    parameters = {name: p for name, p in floating_parameters(model) if name in receivers or name in among}
    for name, parameter in parameters.items():
        check_values(name, parameter)
    chosen = {name: p for name, p in parameters.items() if name in receivers}
    frozen = {name: p for name, p in chosen.items() if isinstance(p, FrozenWeight)}
    plain = [p for p in parameters.values() if not isinstance(p, FrozenWeight)]
    with torch.enable_grad(), _requiring_gradients(model, plain), ExitStack() as stack:
        leaves: dict[str, Tensor] = dict(chosen)
        for name, weight in frozen.items():
            leaves[name] = stack.enter_context(weight.collecting_gradient())
        for name, leaf in leaves.items():
            leaf.register_hook(_hook(receivers[name]))

        def backward(loss: Tensor) -> None:
            # not loss.backward(), which would also run the hooks around the accumulation into `grad`
            torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)

        yield backward


@contextmanager
def _requiring_gradients(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which only the chosen parameters require gradients, and none has its hooks. Restores both."""
    ids = {id(parameter) for parameter in chosen}
    before = [(p, p.requires_grad, p._backward_hooks) for p in model.parameters() if not isinstance(p, FrozenWeight)]
    try:
        for parameter, requires_grad, _ in before:
            if requires_grad != (id(parameter) in ids):
                parameter.requires_grad_(id(parameter) in ids)
            if id(parameter) in ids:
                parameter._backward_hooks = None
        yield
    finally:
        try:
            _restore_parameters(before, ids)
        except BaseException:  # a hook that stays would empty the user's own gradients: an interrupt must not cause it
            _restore_parameters(before, ids)
            raise


def _restore_parameters(before: Iterable[tuple[nn.Parameter, bool, Any]], ids: Container[int]) -> None:
    for parameter, requires_grad, hooks in before:
        if id(parameter) in ids:
            parameter._backward_hooks = hooks
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)


def _hook(receive: Receiver) -> Callable[[Tensor], Tensor | None]:
    def deliver(gradient: Tensor) -> Tensor | None:
        if gradient.layout != torch.strided:  # of an embedding with sparse=True: a few rows
            receive(gradient.detach().to_dense())
            return None
        receive(gradient.detach())
        return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand_as(gradient)  # frees the gradient

    return deliver


def stream_batch_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction | None,
    receivers: Mapping[str, Receiver],
    *,
    among: Collection[str] | None = None,
) -> int:
    """Computes the gradient on each calibration batch and hands it to the receivers.

    Args:
        model: the model, run in evaluation mode. Afterwards the model and torch's random generators are as before:
            each submodule's mode, ``requires_grad``, ``grad``, hooks, and buffers that the loss writes in place.
        batches: inputs of ``loss``, at least one.
        loss: computes the model's loss on one batch, a scalar. None uses the language-model loss of a transformers
            causal LM.
        receivers: receiver by parameter name; see ``stream_gradients``.
        among: names of all parameters that get their gradients, here or in further passes. The plain ones require
            gradients in each pass, since torch's forward may have other last bits if they do not; backpropagation still
            ends at the first parameter with a receiver. Nothing is kept for frozen ones of other passes. A loss then
            need not depend on a parameter with a receiver. None: those with a receiver, in one pass.

    Returns:
        The number of batches.

    Raises:
        MaskError: if there is no batch, or a loss is not one finite number or does not depend on any parameter with a
            receiver.
        ModelError: if ``loss`` is None and the model is no causal LM of transformers, or see ``stream_gradients``.
    """
    count = 0
    with stream_gradients(model, receivers, among=among or ()) as backward, _unchanged(model):
        loss = loss or _default_loss(model)
        for batch in batches:
            value = loss(model, batch)
            _check_loss(value, f"the loss on calibration batch {count}", depends=among is None)
            if value.requires_grad:
                backward(value)
            count += 1
    if count == 0:
        raise MaskError("no calibration batch was given; at least one is needed to compute gradients")
    return count


def _default_loss(model: nn.Module) -> LossFunction:
    from .lm.causal import check_causal  # deferred: they import transformers
    from .lm.text_loss import language_model_loss

    check_causal(model)
    return language_model_loss


def _check_loss(value: Any, name: str, *, depends: bool) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise MaskError(f"{name} must be a tensor with one element, got {shape}")
    if not torch.isfinite(value):
        raise MaskError(f"{name} is {value.item()}; it must be finite")
    if depends and not value.requires_grad:
        raise MaskError(f"{name} does not depend on the chosen parameters")


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Context in which the model is in evaluation mode. Restores modes, buffers and torch's random generators."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers() if not buffer.is_inference()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            model.eval()
            yield
        finally:
            try:
                _restore_modules(modes, buffers)
            except BaseException:
                _restore_modules(modes, buffers)
                raise


@torch.no_grad()
def _restore_modules(modes: Iterable[tuple[nn.Module, bool]], buffers: Iterable[tuple[Tensor, Tensor, int]]) -> None:
    for module, training in modes:
        module.training = training
    for buffer, value, version in buffers:
        if buffer._version != version:
            buffer.copy_(value)


__all__ = ["Backward", "LossFunction", "Receiver", "stream_batch_gradients", "stream_gradients"]
