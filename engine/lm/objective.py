"""Losses and candidate scores of a language model on the examples of a task, classification or free text.

Only the logits that a result needs are computed: those that predict an answer's tokens.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .batches import Batch
from .scored_batches import ScoredBatch
from .text_loss import token_losses

# Evaluates functions that each compute a result of one micro-batch, perhaps in several processes. Arguments: the
# functions, the number of elements of each result, the device of the results. Returns all results, float32 and flat, in
# order, with the same bits as if this process had computed them.
MicroBatchMap = Callable[[Sequence[Callable[[], Tensor]], Sequence[int], torch.device], list[Tensor]]


# Examples of a classification task, or of free text.
AnyBatch = Batch | ScoredBatch


class Objective(StrEnum):
    """Loss of a task.

    ``CANDIDATES``: cross-entropy over the label words' mean log-likelihoods. For classification only.
    ``LANGUAGE_MODEL``: mean negative log-likelihood of the answers' tokens over the whole vocabulary, as in MeZO.
    ``LANGUAGE_MODEL_BY_EXAMPLE``: the same, as a mean over the examples of the mean over each one's answer tokens.
    """

    CANDIDATES = "candidates"
    LANGUAGE_MODEL = "language-model"
    LANGUAGE_MODEL_BY_EXAMPLE = "language-model-by-example"

    @property
    def answers(self) -> str:
        """The answers that a batch needs for this loss; see ``Examples.batch``."""
        return "all" if self is Objective.CANDIDATES else "gold"


def task_loss(
    model: nn.Module,
    batch: AnyBatch | Sequence[AnyBatch],
    objective: Objective,
    micro_batch_map: MicroBatchMap | None = None,
) -> Tensor:
    """Computes the loss of a batch.

    Args:
        model: a transformers causal LM.
        batch: a batch made for this objective (see ``EncodedTask.batch``), or the micro-batches of a large one. They
            are processed one after the other, so that activations and logits of one micro-batch exist at a time. This
            holds under autograd too: each micro-batch is computed once more for its gradient.
        objective: the loss to compute.
        micro_batch_map: evaluates the micro-batches, where no gradients are needed; None evaluates them one after the
            other in this process.

    Returns:
        float32 scalar: the mean over all answer tokens (language model), else over all examples. The losses
        of micro-batches are summed in float64, each weighted by its share of the examples or answer tokens; the sum
        equals the loss of the large batch up to float rounding.

    Raises:
        ValueError: if there are no micro-batches.

    References:
        MeZO, arXiv 2305.17333, appendix E (prompts and the loss on the answer).
    """
    micro_batches = [batch] if isinstance(batch, AnyBatch) else list(batch)
    if not micro_batches:
        raise ValueError("a loss needs at least one batch, got none")
    if len(micro_batches) == 1:
        return _batch_loss(model, micro_batches[0], objective)
    counts = torch.stack([_loss_terms(micro_batch, objective) for micro_batch in micro_batches])
    total = torch.zeros((), dtype=torch.float64, device=counts.device)
    losses = _evaluate(_batch_loss, model, micro_batches, objective, micro_batch_map, [1] * len(micro_batches))
    for loss, share in zip(losses, counts / counts.sum(), strict=True):
        total = total + loss.reshape(()).double() * share
    return total.float()


def _evaluate(
    loss: Callable[[nn.Module, AnyBatch, Objective], Tensor],
    model: nn.Module,
    micro_batches: Sequence[AnyBatch],
    objective: Objective,
    micro_batch_map: MicroBatchMap | None,
    sizes: Sequence[int],
) -> Iterable[Tensor]:
    """Evaluates ``loss`` on each micro-batch.

    Without ``micro_batch_map`` the result is lazy: each loss is computed when the caller asks for it.

    Args:
        loss: function of model, micro-batch and objective; returns float32.
        model: a transformers causal LM.
        micro_batches: the micro-batches.
        objective: third argument of ``loss``.
        micro_batch_map: see ``task_loss``.
        sizes: number of elements that ``loss`` returns for each micro-batch.
    """
    if micro_batch_map is not None:
        functions = [functools.partial(loss, model, micro_batch, objective) for micro_batch in micro_batches]
        return micro_batch_map(functions, sizes, next(model.parameters()).device)
    if torch.is_grad_enabled():
        return (
            cast(Tensor, checkpoint(loss, model, micro_batch, objective, use_reentrant=False))
            for micro_batch in micro_batches
        )
    return (loss(model, micro_batch, objective) for micro_batch in micro_batches)


def example_losses(
    model: nn.Module,
    batch: AnyBatch | Sequence[AnyBatch],
    objective: Objective,
    micro_batch_map: MicroBatchMap | None = None,
) -> Tensor:
    """Computes the loss of each example.

    Args:
        model: a transformers causal LM.
        batch: a batch made for this objective, or micro-batches, which are processed one after the other. An empty
            sequence is a batch without examples.
        objective: cross-entropy over the candidates, or mean negative log-likelihood of the example's answer tokens.
            The mean of the former over a batch is ``task_loss``. The latter weights all examples equally, whereas
            ``task_loss`` weights all answer tokens equally.
        micro_batch_map: see ``task_loss``.

    Returns:
        float32 [n] on the model's device, in the batch's order.
    """
    micro_batches = [batch] if isinstance(batch, AnyBatch) else list(batch)
    empty = torch.empty(0, dtype=torch.float32, device=next(model.parameters()).device)
    sizes = [len(micro_batch) for micro_batch in micro_batches]
    losses = _evaluate(_losses_by_example, model, micro_batches, objective, micro_batch_map, sizes)
    return torch.cat([empty, *losses])


def _losses_by_example(model: nn.Module, batch: AnyBatch, objective: Objective) -> Tensor:
    if isinstance(batch, ScoredBatch):
        return batch.by_text(token_losses(model, batch)).sum(dim=1) / batch.lengths
    if objective is Objective.CANDIDATES:
        return functional.cross_entropy(candidate_scores(model, batch), batch.labels, reduction="none")
    return -_mean_log_likelihoods(model, batch)


def _loss_terms(batch: AnyBatch, objective: Objective) -> Tensor:
    """Number of examples or answer tokens that the loss is a mean over: float64 scalar."""
    lengths = batch.lengths if isinstance(batch, ScoredBatch) else batch.answer_lengths
    if objective is Objective.LANGUAGE_MODEL:
        return lengths.sum().double()
    return torch.full((), len(batch), dtype=torch.float64, device=lengths.device)


def _batch_loss(model: nn.Module, batch: AnyBatch, objective: Objective) -> Tensor:
    if objective is Objective.LANGUAGE_MODEL_BY_EXAMPLE:
        return _losses_by_example(model, batch, objective).mean()
    if isinstance(batch, ScoredBatch):
        return batch.by_text(token_losses(model, batch)).sum() / batch.lengths.sum()
    if objective is Objective.CANDIDATES:
        return functional.cross_entropy(candidate_scores(model, batch), batch.labels)
    return -_answer_log_likelihoods(model, batch).sum() / batch.answer_lengths.sum()


def candidate_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Mean log-likelihood per token of each candidate answer, up to a constant per example: float32 [B, C].

    Args:
        model: a transformers causal LM.
        batch: a batch with ``answers="all"``; see ``EncodedTask.batch``.
    """
    if batch.candidate_ids is not None:  # all candidates are single tokens: one sequence per example scores them all
        return batch.rows.logits(model)[:, batch.candidate_ids].float()
    return _mean_log_likelihoods(model, batch).view(len(batch.labels), -1)


def _mean_log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """Mean log-likelihood of the tokens of each answer: float32 [S]."""
    return _answer_log_likelihoods(model, batch).sum(dim=1) / batch.answer_lengths


def _answer_log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """Log-likelihood of each answer token, 0 where there is none: float32 [S, longest answer]."""
    logits, places = batch.rows.logits(model).float(), batch.answer_places
    chosen = logits[places, batch.answer_tokens] - logits.logsumexp(-1)[places]
    return torch.where(batch.answer_mask, chosen, 0.0)


__all__ = ["AnyBatch", "MicroBatchMap", "Objective", "candidate_scores", "example_losses", "task_loss"]
