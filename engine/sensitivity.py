"""Which elements matter: squared gradients over calibration text, and the choice of the k largest over the model.

    s_j = mean over batches of (d loss / d w_j)**2

References:
    Meerkat, arXiv 2506.03337, section 3 (the mask); SensZOQ, arXiv 2406.02913 (sensitive parameters are static).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MaskError
from .gradients import LossFunction, Receiver, stream_batch_gradients
from .parameters import floating_parameters


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


def accumulate(model: nn.Module, batches: Iterable[Any], loss: LossFunction | None) -> Sensitivity:
    """Mean and mean square of the gradient of every parameter over some batches.

    Memory beside the model and the activations: 8 bytes an element for the accumulators, and one gradient at a time:
    each is added up as backpropagation delivers it, and freed.

    Args:
        model: run in evaluation mode; left as it was (mode, ``requires_grad``, ``grad``).
        batches: what ``loss`` takes, at least one.
        loss: of the model on one batch, a scalar; None is the language-model loss of a transformers causal LM.

    Raises:
        MaskError: if there is no batch, or a loss or gradient is not finite.
    """
    named = list(floating_parameters(model))
    squares = [torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format) for _, p in named]
    means = [torch.zeros_like(square) for square in squares]
    collectors = {name: _collector(*pair) for (name, _), *pair in zip(named, squares, means, strict=True)}
    count = stream_batch_gradients(model, batches, loss, collectors)
    for (name, _), square, mean in zip(named, squares, means, strict=True):
        square.div_(count)
        mean.div_(count)
        if not torch.isfinite(square).all():
            raise MaskError(f"the gradient of {name!r} is not finite or overflows when squared; calibrate in float32")
    return Sensitivity(squares, means, count)


def _collector(square: Tensor, mean: Tensor) -> Receiver:
    def collect(gradient: Tensor) -> None:
        gradient = gradient.float()
        mean.add_(gradient)
        square.addcmul_(gradient, gradient)

    return collect


def gradient_at(
    model: nn.Module, batches: Iterable[Any], loss: LossFunction | None, wanted: Mapping[str, Tensor]
) -> list[Tensor]:
    """Mean gradient over some batches at chosen elements; memory for those, and one parameter's gradient at a time.

    Args:
        model: as for ``accumulate``.
        batches: as for ``accumulate``.
        loss: as for ``accumulate``.
        wanted: by parameter name, int64 [n] flat offsets.

    Returns:
        Of each, float32 [n] on the CPU; bit for bit what ``accumulate`` has there.

    Raises:
        MaskError: as ``accumulate``.
    """
    places = {name: p.device for name, p in floating_parameters(model)}
    sums = {name: torch.zeros(at.numel(), device=places[name]) for name, at in wanted.items()}

    def adder(name: str) -> Receiver:
        at, total = wanted[name].to(places[name]), sums[name]

        def add(gradient: Tensor) -> None:
            total.add_(gradient.reshape(-1)[at].float())

        return add

    count = stream_batch_gradients(model, batches, loss, {name: adder(name) for name in wanted})
    for name, total in sums.items():
        if not torch.isfinite(total.div_(count)).all():
            raise MaskError(f"the gradient of {name!r} is not finite; calibrate in float32")
    return [total.cpu() for total in sums.values()]


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


__all__ = ["LossFunction", "Sensitivity", "accumulate", "gradient_at", "largest"]
