"""Sensitivity of the elements: squared gradients on calibration text, and selection of the model's k largest scores.

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
    """Gradient statistics of a calibration, one float32 tensor per parameter in id order.

    Args:
        squares: mean squared gradient of each element, one tensor per parameter.
        means: mean gradient of each element, one tensor per parameter.
        batches: number of batches in the means.
    """

    squares: list[Tensor]
    means: list[Tensor]
    batches: int


def accumulate_gradients(model: nn.Module, batches: Iterable[Any], loss: LossFunction | None) -> Sensitivity:
    """Computes mean and mean square of every parameter's gradient over batches.

    Memory besides the model and the activations: 8 bytes per element for the accumulators, and one parameter's gradient
    at a time. Each gradient is accumulated as backpropagation produces it, and freed.

    Args:
        model: the model, run in evaluation mode. Mode, ``requires_grad`` and ``grad`` are restored.
        batches: inputs of ``loss``, at least one.
        loss: computes the model's loss on one batch, a scalar. None uses the language-model loss of a transformers
            causal LM.

    Raises:
        MaskError: if there is no batch, or a loss or gradient is not finite.
    """
    parameters = dict(floating_parameters(model))
    squares = [
        torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format) for p in parameters.values()
    ]
    means = [torch.zeros_like(square) for square in squares]
    collectors = {name: _collector(square, mean) for name, square, mean in zip(parameters, squares, means, strict=True)}
    count = stream_batch_gradients(model, batches, loss, collectors)
    for name, square, mean in zip(parameters, squares, means, strict=True):
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
    model: nn.Module, batches: Iterable[Any], loss: LossFunction | None, offsets: Mapping[str, Tensor]
) -> list[Tensor]:
    """Computes the mean gradient over batches at chosen elements.

    Memory: the gradient of the chosen elements, and one parameter's gradient at a time.

    Args:
        model: the model, see ``accumulate_gradients``.
        batches: calibration batches, see ``accumulate_gradients``.
        loss: loss function, see ``accumulate_gradients``.
        offsets: flat offsets of the chosen elements by parameter name, int64 [n] each.

    Returns:
        Mean gradients in the order of ``offsets``, float32 [n] each on the CPU; bit-identical to the means of
        ``accumulate_gradients`` at these elements.

    Raises:
        MaskError: see ``accumulate_gradients``.
    """
    devices = {name: p.device for name, p in floating_parameters(model)}
    sums = {name: torch.zeros(chosen.numel(), device=devices[name]) for name, chosen in offsets.items()}

    def adder(name: str) -> Receiver:
        chosen, total = offsets[name].to(devices[name]), sums[name]

        def add(gradient: Tensor) -> None:
            total.add_(gradient.reshape(-1)[chosen].float())

        return add

    count = stream_batch_gradients(model, batches, loss, {name: adder(name) for name in offsets})
    for name, total in sums.items():
        if not torch.isfinite(total.div_(count)).all():
            raise MaskError(f"the gradient of {name!r} is not finite; calibrate in float32")
    return [total.cpu() for total in sums.values()]


def select_largest(scores: Callable[[int], Tensor], count: int, k: int) -> tuple[Tensor, Tensor]:
    """Selects the k largest scores over all tensors. Ties go to the lower id.

    Holds the scores of one tensor at a time, and the k best values so far.

    Args:
        scores: returns the scores of tensor ``i``, float32, flat. Called twice for each tensor.
        count: number of tensors. Their elements have consecutive ids, in order.
        k: number of elements to select, from 1 to the total number of elements.

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


__all__ = ["LossFunction", "Sensitivity", "accumulate_gradients", "gradient_at", "select_largest"]
