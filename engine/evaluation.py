"""Accuracy and loss of a model on a task's examples."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from .examples import EncodedTask
from .objective import candidate_scores

@dataclass(frozen=True)
class Evaluation:
    """Results over a set of examples.

    Args:
        accuracy: share of examples whose most likely candidate is the right one, in [0, 1].
        loss: mean cross-entropy over the candidates.
        examples: how many.
    """

    accuracy: float
    loss: float
    examples: int

@torch.inference_mode()
def evaluate(model: nn.Module, data: EncodedTask, batch_size: int = 32) -> Evaluation:
    """Evaluates on all examples; the shortest prompts go together, so that little is padded."""
    device = next(model.parameters()).device
    order = sorted(range(len(data)), key=lambda i: len(data.prompts[i]))
    correct, loss = 0, 0.0
    for start in range(0, len(order), batch_size):
        batch = data.batch(order[start : start + batch_size], answers="all", device=device)
        scores = candidate_scores(model, batch)
        correct += int((scores.argmax(-1) == batch.labels).sum())
        loss += float(functional.cross_entropy(scores, batch.labels, reduction="sum"))
    return Evaluation(correct / len(order), loss / len(order), len(order))

__all__ = ["Evaluation", "evaluate"]
