"""Sensitivity of the elements: squared gradients on calibration text, and selection of the model's k largest scores.

    s_j = mean over batches of (d loss / d w_j)**2

References:
    Meerkat, arXiv 2506.03337, section 3 (the mask); SensZOQ, arXiv 2406.02913 (sensitive parameters are static).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MaskError
from .gradients import LossFunction, Receiver, stream_batch_gradients
from .parameters import floating_parameters

# Elements ranked at a time, unless more are selected: torch.topk needs 16 bytes for each.
_PIECE = 1 << 20


@dataclass(frozen=True)
class Sensitivity:
    """Gradient statistics of a calibration, one float32 tensor per parameter by its name, in id order.

    Args:
        squares: mean squared gradient of each element.
        means: mean gradient of each element.
        batches: number of batches in the means.
        reached: names of the parameters that a loss depends on; the gradients of the others are 0.
    """

    squares: dict[str, Tensor]
    means: dict[str, Tensor]
    batches: int
    reached: frozenset[str] = frozenset()


@torch.inference_mode(False)
def accumulate_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction | None,
    names: Collection[str] | None = None,
    *,
    among: Collection[str] | None = None,
) -> Sensitivity:
    """Computes mean and mean square of parameters' gradients over batches.

    Memory besides the model and the activations: 8 bytes per element for the accumulators, one parameter's gradient at
    a time (dense, also of an embedding with sparse gradients), and a copy of the buffers. Each gradient is accumulated
    as backpropagation produces it, and freed.

    Args:
        model: the model, run in evaluation mode and unchanged afterwards; see ``gradients.stream_batch_gradients``.
        batches: inputs of ``loss``, at least one.
        loss: computes the model's loss on one batch, a scalar. None uses the language-model loss of a transformers
            causal LM.
        names: names of the parameters; None for all that have element ids, frozen ones too.
        among: names of all parameters of which these are a part; see ``gradients.stream_batch_gradients``.

    Raises:
        MaskError: if there is no batch, or a loss or gradient is not finite.
        ModelError: if ``loss`` is None and the model is no causal LM of transformers, or a parameter has no values that
            can be differentiated.
    """
    parameters = {name: p for name, p in floating_parameters(model) if names is None or name in names}
    squares = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in parameters.items()}
    means = {name: torch.zeros_like(square) for name, square in squares.items()}
    reached: set[str] = set()
    collectors = {name: _collector(squares[name], means[name], partial(reached.add, name)) for name in parameters}
    count = stream_batch_gradients(model, batches, loss, collectors, among=among)
    for name, square in squares.items():
        square.div_(count)
        means[name].div_(count)
        if not torch.isfinite(square).all():
            raise MaskError(f"the gradient of {name!r} is not finite or overflows when squared; calibrate in float32")
    return Sensitivity(squares, means, count, frozenset(reached))


def _collector(square: Tensor, mean: Tensor, note: Callable[[], None]) -> Receiver:
    def collect(gradient: Tensor) -> None:
        note()
        gradient = gradient.float()
        mean.add_(gradient)
        square.addcmul_(gradient, gradient)

    return collect


@torch.inference_mode(False)
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
    sums = {
        name: torch.zeros(chosen.numel(), dtype=torch.float32, device=devices[name]) for name, chosen in offsets.items()
    }

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


def select_largest(
    tensors: Sequence[Tensor],
    k: int,
    *,
    bases: Sequence[int] | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Selects the k elements with the largest scores over all tensors. Ties go to the lower id.

    Memory besides the tensors: at most 80 bytes for each of ``max(k, 2**20)`` elements, the result included.

    Args:
        tensors: values of the elements, of any shape.
        k: number of elements to select, from 1 to the total number of elements.
        bases: id of each tensor's first element, ascending; within a tensor the ids are consecutive. None numbers the
            elements of all tensors from 0.
        score: computes the scores of a flat piece of a tensor, float32 [n] without NaN. None takes the values as the
            scores, which must then be float32.

    Returns:
        ids: int64 [k], ascending.
        best: float32 [k], the scores at these ids.
    """
    if bases is None:
        bases = list(accumulate([tensor.numel() for tensor in tensors], initial=0))[:-1]
    best = _largest((scores for _, scores in _pieces(tensors, bases, k, score)), k)
    threshold = best.min()
    ties = k - int((best > threshold).sum())
    ids, chosen = [], []
    for base, scores in _pieces(tensors, bases, k, score):
        above = scores > threshold.to(scores.device)
        if ties:
            equal = torch.nonzero(scores == threshold.to(scores.device)).view(-1)[:ties]
            above[equal] = True
            ties -= equal.numel()
        at = torch.nonzero(above).view(-1)
        ids.append((at + base).cpu())
        chosen.append(scores[at].cpu())
    return torch.cat(ids), torch.cat(chosen)


def _largest(pieces: Iterable[Tensor], k: int) -> Tensor:
    """The k largest of all scores: float32 [k] on the device of the first piece.

    Those that may be among them are collected and ranked when there are enough, so that few pieces cost a ranking.
    """
    candidates: list[Tensor] = []  # the largest so far, then scores of later pieces that are above the least of them
    count, least = 0, None
    for scores in pieces:
        if least is not None:
            scores = scores[scores > least.to(scores.device)]
        if scores.numel() > k:
            scores = _top(scores, k)
        candidates.append(scores.to(candidates[0].device if candidates else scores.device))
        count += scores.numel()
        if count >= k and (least is None or count >= k + max(k, _PIECE) // 2):
            candidates, count = [_top(torch.cat(candidates), k)], k
            least = candidates[0].min()
    return _top(torch.cat(candidates), k)


def _top(values: Tensor, k: int) -> Tensor:
    return torch.topk(values, k, sorted=False).values


def _pieces(
    tensors: Sequence[Tensor], bases: Sequence[int], k: int, score: Callable[[Tensor], Tensor] | None
) -> Iterator[tuple[int, Tensor]]:
    """Cuts the tensors into pieces and yields each one's first id and its scores, float32 [n], in id order."""
    for base, tensor in zip(bases, tensors, strict=True):
        for piece in tensor.reshape(-1).split(max(k, _PIECE)):
            yield base, piece if score is None else score(piece)
            base += piece.numel()


__all__ = ["LossFunction", "Sensitivity", "accumulate_gradients", "gradient_at", "select_largest"]
