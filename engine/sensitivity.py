"""Which elements matter: squared gradients over calibration text, and the choice of the k largest over the model.

    s_j = mean over batches of (d loss / d w_j)**2

References:
    Meerkat, arXiv 2506.03337, section 3 (the mask); SensZOQ, arXiv 2406.02913 (sensitive parameters are static).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MaskError
from .parameters import floating_parameters

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """Accumulators of a calibration, one float32 tensor per parameter in id order.

    Args:
        squares: mean squared gradient.
        means: mean gradient.
        batches: how many batches they are means over.
    """

    squares: list[Tensor]
    means: list[Tensor]
    batches: int


def accumulate(model: nn.Module, batches: Iterable[Any], loss: LossFunction) -> Sensitivity:
    """Mean and mean square of the gradient of every parameter over some batches.

    Memory beside the model and the activations: 8 bytes an element for the accumulators, and one gradient at a time:
    each is added up as backpropagation delivers it, and freed.

    Args:
        model: run in evaluation mode; left as it was (mode, ``requires_grad``, ``grad``).
        batches: what ``loss`` takes, at least one.
        loss: of the model on one batch, a scalar.

    Raises:
        MaskError: if there is no batch, or a loss or gradient is not finite.
    """
    named = list(floating_parameters(model))
    squares = [torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format) for _, p in named]
    means = [torch.zeros_like(square) for square in squares]
    before = [(p.requires_grad, p.grad) for _, p in named]
    training = model.training
    hooks = []
    count = 0
    try:
        model.eval()
        for (_, parameter), square, mean in zip(named, squares, means, strict=True):
            parameter.grad = None
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(_collector(square, mean)))
        for batch in batches:
            with torch.enable_grad():
                value = loss(model, batch)
                if not torch.isfinite(value):
                    raise MaskError(
                        f"the loss on calibration batch {count} is {value.item()}; the mask needs finite ones"
                    )
                value.backward()
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
        for (_, parameter), (requires_grad, grad) in zip(named, before, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        model.train(training)
    if count == 0:
        raise MaskError("no calibration batch was given; a mask from gradients needs at least one")
    for (name, _), square, mean in zip(named, squares, means, strict=True):
        square.div_(count)
        mean.div_(count)
        if not torch.isfinite(square).all():
            raise MaskError(f"the gradient of {name!r} is not finite or overflows when squared; calibrate in float32")
    return Sensitivity(squares, means, count)


def _collector(square: Tensor, mean: Tensor) -> Callable[[Tensor], None]:
    def collect(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        gradient = gradient.detach().float()
        mean.add_(gradient)
        square.addcmul_(gradient, gradient)
        parameter.grad = None

    return collect


def largest(scores: Callable[[int], Tensor], count: int, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores over all tensors, ties to the lower id.

    Holds the scores of one tensor at a time, and the k best values so far.

    Args:
        scores: the scores of tensor ``i``, float32, flat; asked for twice.
        count: number of tensors; their elements have consecutive ids, in order.
        k: at least 1, at most the number of elements.

    Returns:
        ids: int64 [k], ascending.
        best: float32 [k], the scores at these ids.
    """
    best = torch.empty(0)
    for i in range(count):
        tensor = scores(i)
        values = torch.topk(tensor, min(k, tensor.numel()), sorted=False).values.cpu()
        merged = torch.cat([best, values])
        best = torch.topk(merged, min(k, merged.numel()), sorted=False).values
    threshold = best.min()
    ties = k - int((best > threshold).sum())
    ids, chosen, base = [], [], 0
    for i in range(count):
        tensor = scores(i)
        above = tensor > threshold.to(tensor.device)
        if ties:
            equal = torch.nonzero(tensor == threshold.to(tensor.device)).view(-1)[:ties]
            above[equal] = True
            ties -= equal.numel()
        at = torch.nonzero(above).view(-1)
        ids.append((at + base).cpu())
        chosen.append(tensor[at].cpu())
        base += tensor.numel()
    return torch.cat(ids), torch.cat(chosen)


__all__ = ["LossFunction", "Sensitivity", "accumulate", "largest"]
