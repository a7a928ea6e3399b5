"""Accuracy, macro-F1 and loss of a model on a task's examples."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .examples import EncodedTask
from .objective import candidate_scores


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results over a set of examples.

    Args:
        accuracy: share of examples whose most likely candidate is the right one, in [0, 1].
        macro_f1: see ``macro_f1``.
        loss: mean cross-entropy over the candidates.
        examples: how many.
    """

    accuracy: float
    macro_f1: float
    loss: float
    examples: int


@torch.inference_mode()
def evaluate(model: nn.Module, data: EncodedTask, batch_size: int = 32) -> Evaluation:
    """Evaluates on all examples; the shortest prompts go together, so that little is padded."""
    device = next(model.parameters()).device
    order = sorted(range(len(data)), key=lambda i: len(data.prompts[i]))
    confusion, loss = torch.zeros(len(data.candidates), len(data.candidates), dtype=torch.int64), 0.0
    for start in range(0, len(order), batch_size):
        batch = data.batch(order[start : start + batch_size], answers="all", device=device)
        scores = candidate_scores(model, batch)
        confusion += confusion_matrix(batch.labels.cpu(), scores.argmax(-1).cpu(), len(confusion))
        loss += float(functional.cross_entropy(scores, batch.labels, reduction="sum"))
    return Evaluation(
        accuracy=int(confusion.trace()) / len(order),
        macro_f1=macro_f1(confusion),
        loss=loss / len(order),
        examples=len(order),
    )


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How often each class (row) was taken for each class (column): int64 [C, C] from int64 [n] twice."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def macro_f1(confusion: Tensor) -> float:
    """Mean over the classes of F1, the harmonic mean of precision and recall, in [0, 1].

    A class that is neither present nor predicted has no F1 and does not count.

    Args:
        confusion: int64 [C, C], true class by predicted class.
    """
    hits, seen = confusion.diagonal().double(), confusion.sum(0) + confusion.sum(1)
    return float((2 * hits[seen > 0] / seen[seen > 0]).mean())


__all__ = ["Evaluation", "confusion_matrix", "evaluate", "macro_f1"]
