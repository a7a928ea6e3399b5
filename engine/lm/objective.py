"""Losses of a language model on text, and losses and candidate scores on a classification task.

Only the logits that a result needs are computed: those that predict an answer's tokens for a task, those of 128
positions at a time for text. A tensor [batch, length, vocabulary] never exists.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import DataError, ModelError
from .batches import Batch, TextBatch
from .causal import causal_lm, position_ids

# Positions whose logits exist at a time in the language-model loss: 128 x 128,256 in float32 is 66 MB.
_POSITIONS = 128

# Evaluates functions that each compute a result of one micro-batch, perhaps in several processes. Arguments: the
# functions, the number of elements of each result, the device of the results. Returns all results, float32 and flat, in
# order, with the same bits as if this process had computed them.
MicroBatchMap = Callable[[Sequence[Callable[[], Tensor]], Sequence[int], torch.device], list[Tensor]]


class Objective(StrEnum):
    """Loss of a classification task.

    ``CANDIDATES``: cross-entropy over the label words' mean log-likelihoods.
    ``LANGUAGE_MODEL``: mean negative log-likelihood of the answer's tokens over the whole vocabulary, as in MeZO.
    """

    CANDIDATES = "candidates"
    LANGUAGE_MODEL = "language-model"


def task_loss(
    model: nn.Module, batch: Batch | Sequence[Batch], objective: Objective, micro_batch_map: MicroBatchMap | None = None
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
        float32 scalar: the mean over all examples (candidates) or over all answer tokens (language model). The losses
        of micro-batches are summed in float64, each weighted by its share of the examples or answer tokens; the sum
        equals the loss of the large batch up to float rounding.

    Raises:
        ValueError: if there are no micro-batches.

    References:
        MeZO, arXiv 2305.17333, appendix E (prompts and the loss on the answer).
    """
    micro_batches = [batch] if isinstance(batch, Batch) else list(batch)
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
    loss: Callable[[nn.Module, Batch, Objective], Tensor],
    model: nn.Module,
    micro_batches: Sequence[Batch],
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
    model: nn.Module, batch: Batch | Sequence[Batch], objective: Objective, micro_batch_map: MicroBatchMap | None = None
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
    micro_batches = [batch] if isinstance(batch, Batch) else list(batch)
    empty = torch.empty(0, dtype=torch.float32, device=next(model.parameters()).device)
    sizes = [len(micro_batch.labels) for micro_batch in micro_batches]
    losses = _evaluate(_losses_by_example, model, micro_batches, objective, micro_batch_map, sizes)
    return torch.cat([empty, *losses])


def _losses_by_example(model: nn.Module, batch: Batch, objective: Objective) -> Tensor:
    if objective is Objective.CANDIDATES:
        return functional.cross_entropy(candidate_scores(model, batch), batch.labels, reduction="none")
    return -_mean_log_likelihoods(model, batch)


def _loss_terms(batch: Batch, objective: Objective) -> Tensor:
    """Number of examples or answer tokens that the loss is a mean over: float64 scalar."""
    if objective is Objective.CANDIDATES:
        return torch.full((), len(batch.labels), dtype=torch.float64, device=batch.labels.device)
    return batch.answer_lengths.sum().double()


def _batch_loss(model: nn.Module, batch: Batch, objective: Objective) -> Tensor:
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


def language_model_loss(model: nn.Module, batch: Tensor | Mapping[str, Tensor] | TextBatch) -> Tensor:
    """Mean next-token cross-entropy on text: float32 scalar, differentiable.

    Positions count from each text's first token, whatever padding is before it, so the loss is that of the same texts
    without padding.

    Args:
        model: a transformers causal LM; see ``causal.causal_lm``.
        batch: int64 token ids [B, L], or a mapping with ``input_ids`` [B, L] and optionally ``attention_mask`` and
            ``labels`` (-100 at positions that are not predicted), as tokenizers and collators make them; or texts in
            packed rows.

    Raises:
        ModelError: if the model is no transformers causal LM, or the batch has another or a missing key.
        DataError: if the token ids are not [B, L], or no token is predicted.
    """
    if isinstance(batch, TextBatch):
        lm = causal_lm(model)
        output = cast(Any, lm).get_decoder()(**batch.rows.arguments(lm))
        hidden = output.last_hidden_state.flatten(0, 1)[batch.rows.scored]
        return _mean_loss(lm, type(output), hidden, batch.targets)
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    unknown = inputs.keys() - {"input_ids", "attention_mask", "labels"}
    if unknown or "input_ids" not in inputs:
        raise ModelError(
            f"a text batch needs input_ids, and may have attention_mask and labels; got {', '.join(sorted(inputs))}"
        )
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    inputs = {name: _differentiable(tensor.to(device)) for name, tensor in inputs.items()}
    input_ids = inputs["input_ids"]
    if input_ids.dim() != 2:
        raise DataError(f"the token ids of a text batch must be [batch, length], got {list(input_ids.shape)}")
    mask = inputs.get("attention_mask", torch.ones_like(input_ids))
    labels = inputs.get("labels", input_ids)
    scored = (mask[:, :-1] * mask[:, 1:]).bool() & (labels[:, 1:] != -100)
    if not scored.any():
        raise DataError(
            "a text batch has no token to predict: each text is a single token, or all its labels are -100; leave such "
            "texts out"
        )
    decoder = cast(Any, lm).get_decoder()
    output = decoder(input_ids=input_ids, attention_mask=mask, use_cache=False, **position_ids(decoder, mask))
    return _mean_loss(lm, type(output), output.last_hidden_state[:, :-1][scored], labels[:, 1:][scored])


def _mean_loss(lm: PreTrainedModel, kind: type[ModelOutput], hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy at some positions, whose logits exist for 128 positions at a time; see ``_summed_loss``."""
    decoder = cast(Any, lm).get_decoder()
    total: Tensor = hidden.new_zeros((), dtype=torch.float32)
    for hidden_part, targets_part in zip(hidden.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
        total = total + checkpoint(_summed_loss, lm, decoder, kind, hidden_part, targets_part, use_reentrant=False)
    return total / targets.numel()


def _differentiable(tensor: Tensor) -> Tensor:
    """Returns a tensor that autograd can save, also if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def _summed_loss(
    model: nn.Module, decoder: nn.Module, kind: type[ModelOutput], hidden: Tensor, targets: Tensor
) -> Tensor:
    """Summed cross-entropy at some positions, through the model's own head, including its scaling and soft caps.

    Args:
        model: a transformers causal LM.
        decoder: the model's decoder, ``model.get_decoder()``.
        kind: class of the decoder's output.
        hidden: the decoder's last hidden states [positions, width].
        targets: int64 token ids [positions].

    Raises:
        ModelError: if the model's forward does not call the decoder.
    """
    with _patched_forward(decoder, kind(last_hidden_state=hidden.unsqueeze(0))) as calls:
        logits = model(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
    if not calls:
        raise ModelError(
            f"{type(model).__name__} does not call the decoder that get_decoder() returns, so its head cannot be run "
            f"alone; pass your own loss function"
        )
    return functional.cross_entropy(logits[0].float(), targets, reduction="sum")


@contextmanager
def _patched_forward(module: nn.Module, output: ModelOutput) -> Iterator[list[None]]:
    """Makes the module return ``output`` within this context; yields a list that gets one entry per call."""
    calls: list[None] = []

    def forward(*_: Any, **__: Any) -> ModelOutput:
        calls.append(None)
        return output

    own = vars(module).get("forward")  # libraries that hook into modules, such as accelerate, put a forward here
    module.forward = forward
    try:
        yield calls
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


__all__ = ["MicroBatchMap", "Objective", "candidate_scores", "example_losses", "language_model_loss", "task_loss"]
