"""Gradient descent on the masked elements: what zeroth-order steps are measured against, on the same subspace.

    master <- master - lr * g,    live <- cast(master),    g = gradient at the masked elements

with the same fp32 masters as zeroth-order steps have: FedAvg's local step (arXiv 1602.05629, algorithm 1) under a mask.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .errors import NonFiniteLossError
from .gradients import Receiver, stream_gradients
from .parameters import floating_parameters
from .weights import MaskedWeights


def sgd_steps(
    model: nn.Module,
    weights: MaskedWeights,
    closures: Iterable[Callable[[], Tensor]],
    learning_rates: Sequence[float],
) -> list[Tensor]:
    """Some steps of plain gradient descent on the masked elements.

    Product and difference of the update are rounded separately in fp32. Nothing outside the mask is written. Memory
    beside the activations: one parameter's gradient at a time, and 8 bytes a masked element.

    Args:
        model: in the mode it is to be trained in; ``requires_grad`` and ``grad`` of its parameters are left as they
            were.
        weights: of this model; written.
        closures: one a step; each computes the loss of its batch, a scalar that depends on the model by autograd, and
            is asked for when the step before it is taken.
        learning_rates: one a step at least, finite and not negative.

    Returns:
        The loss of each step, at its beginning, float32 scalars.

    Raises:
        ValueError: for a learning rate out of range, too few of them, or a loss that is none.
        NonFiniteLossError: if a loss or a gradient is NaN or infinite. This and whatever the closure raises leave the
            masters as they were at the beginning of that step; the steps before it stay taken.
        MaskError: if the weights are another model's.
        ModelChangedError: if the model was moved, cast or rebuilt since the weights were located.
    """
    for lr in learning_rates:
        if not 0 <= lr < math.inf:
            raise ValueError(f"a learning rate must be finite and not negative, got {lr}")
    weights.mask.check(model)
    weights.check_same_parameters()
    weights.restore_()
    gradient = torch.zeros_like(weights.masters())
    receivers = _gradient_gatherers(model, weights, gradient)
    losses: list[Tensor] = []
    for step, closure in enumerate(closures):
        if step >= len(learning_rates):
            raise ValueError(f"{len(learning_rates)} learning rates were given for more steps")
        gradient.zero_()
        with stream_gradients(model, receivers), torch.enable_grad():
            loss = _checked(closure(), step)
            loss.backward()
        if not torch.isfinite(gradient).all():
            raise NonFiniteLossError(f"the gradient of step {step} is not finite (try a smaller lr)")
        weights.set_masters_(weights.masters() - gradient * learning_rates[step])
        losses.append(loss.detach().float())
    return losses


def _gradient_gatherers(model: nn.Module, weights: MaskedWeights, out: Tensor) -> dict[str, Receiver]:
    """For every parameter with masked elements, what puts its gradient there into ``out``, float32 [k]."""
    devices = {name: p.device for name, p in floating_parameters(model)}

    def gatherer(offsets: Tensor, part: Tensor) -> Receiver:
        return lambda gradient: _copy(part, gradient.reshape(-1)[offsets])

    return {
        name: gatherer((weights.mask.ids[start:stop] - base).to(devices[name]), out[start:stop])
        for name, base, start, stop in weights.mask.ranges()
    }


def _copy(to: Tensor, values: Tensor) -> None:
    to.copy_(values)


def _checked(loss: Tensor, step: int) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"the closure of step {step} must return one loss that depends on the masked weights by autograd"
        )
    if not math.isfinite(loss.item()):
        raise NonFiniteLossError(f"the loss of step {step} is {loss.item()}; the step was not taken (try a smaller lr)")
    return loss.reshape(())


__all__ = ["sgd_steps"]
