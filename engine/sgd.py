"""SGD on the masked elements: the first-order baseline for zeroth-order steps on the same subspace.

    master <- master - lr * g,    live <- cast(master),    g = gradient at the masked elements

It uses the same fp32 masters as zeroth-order steps. This is FedAvg's local step (arXiv 1602.05629, algorithm 1) under a
mask.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .errors import NonFiniteLossError
from .gradients import Receiver, stream_gradients
from .parameters import floating_parameters
from .weights import MaskedWeights


@torch.inference_mode(False)
def sgd_steps(
    model: nn.Module,
    weights: MaskedWeights,
    closures: Iterable[Callable[[], Tensor]],
    learning_rates: Sequence[float],
) -> list[Tensor]:
    """Takes several steps of plain gradient descent on the masked elements.

    Product and difference of the update are rounded separately in fp32. Nothing outside the mask is written. Memory
    besides the activations: one parameter's gradient at a time, and 8 bytes per masked element.

    Args:
        model: the model, in the mode in which to train it. ``requires_grad`` and ``grad`` of its parameters are
            restored.
        weights: the model's masked weights; written.
        closures: one closure per step. Each computes the loss of its batch, a scalar that depends on the model through
            autograd. The next closure is requested after the step before it.
        learning_rates: learning rate of each step, finite and not negative; at least one per step.

    Returns:
        The loss of each step before its update, float32 scalars.

    Raises:
        ValueError: if a learning rate is out of range or missing, or a closure does not return a differentiable scalar.
        NonFiniteLossError: if a loss or a gradient is NaN or infinite. After this error, or any error of the closure,
            the masters are those from before the step; the steps before it stay applied.
        MaskError: if the weights belong to another model.
        ModelChangedError: if the model was moved, cast or rebuilt after the weights were created.
    """
    for lr in learning_rates:
        if not 0 <= lr < math.inf:
            raise ValueError(f"a learning rate must be finite and not negative, got {lr}")
    weights.mask.check(model)
    weights.check_not_overwritten()
    weights.restore_()
    gradient = torch.zeros_like(weights.masters())
    receivers = _gradient_gatherers(model, weights, gradient)
    losses: list[Tensor] = []
    for step, closure in enumerate(closures):
        if step >= len(learning_rates):
            raise ValueError(f"{len(learning_rates)} learning rates were given, but there are more steps")
        gradient.zero_()
        with stream_gradients(model, receivers) as backward:
            loss = _check_loss(closure(), step)
            backward(loss)
        if not torch.isfinite(gradient).all():
            raise NonFiniteLossError(f"the gradient of step {step} is not finite (try a smaller lr)")
        weights.set_masters_(weights.masters() - gradient * learning_rates[step])
        losses.append(loss.detach().float())
    return losses


def _gradient_gatherers(model: nn.Module, weights: MaskedWeights, out: Tensor) -> dict[str, Receiver]:
    """Makes a receiver for each masked parameter that copies its gradient at the masked elements to ``out``.

    Args:
        model: the model.
        weights: its masked weights.
        out: float32 [k], receives the gradient in mask order.

    Returns:
        The receivers by parameter name.
    """
    devices = {name: p.device for name, p in floating_parameters(model)}

    def gatherer(offsets: Tensor, part: Tensor) -> Receiver:
        def gather(gradient: Tensor) -> None:
            part.copy_(gradient.reshape(-1)[offsets])

        return gather

    return {
        name: gatherer((weights.mask.ids[start:stop] - base).to(devices[name]), out[start:stop])
        for name, base, start, stop in weights.mask.ranges()
    }


def _check_loss(loss: Tensor, step: int) -> Tensor:
    """Returns the loss as a scalar tensor, or raises if it is not one finite, differentiable number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"the closure of step {step} must return one loss that depends on the masked weights through autograd"
        )
    if not math.isfinite(loss.item()):
        raise NonFiniteLossError(
            f"the loss of step {step} is {loss.item()}; the step was not applied (try a smaller lr)"
        )
    return loss.reshape(())


__all__ = ["sgd_steps"]
