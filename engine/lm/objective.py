"""What is computed from a language model: the loss on text, and losses and predictions of a classification task.

Only the logits that a result needs are made: those of the answer positions for a task, those of a few hundred positions
at a time for text. There is never a tensor [batch, length, vocabulary].
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
from transformers.utils import ModelOutput

from ..errors import ModelError
from .examples import Batch

# Positions whose logits exist at a time in the language-model loss: 128 x 128,256 in float32 is 66 MB.
_POSITIONS = 128

# Computes the parts of a batch, float32, perhaps not all of them in this process: from a function each, the number of
# elements of what it returns, and the device; all of them come back, flat, with the bits of computing them here.
MicroBatchMap = Callable[[Sequence[Callable[[], Tensor]], Sequence[int], torch.device], list[Tensor]]


class Objective(StrEnum):
    """The loss of a classification task.

    ``CANDIDATES``: cross-entropy over the label words' mean log-likelihoods.
    ``LANGUAGE_MODEL``: mean negative log-likelihood of the answer's tokens over the whole vocabulary, as in MeZO.
    """

    CANDIDATES = "candidates"
    LANGUAGE_MODEL = "language-model"


def task_loss(
    model: nn.Module, batch: Batch | Sequence[Batch], objective: Objective, micro_batch_map: MicroBatchMap | None = None
) -> Tensor:
    """Loss of the batch: float32 scalar.

    Args:
        model: a transformers causal LM.
        batch: made for this objective (see ``EncodedTask.batch``); or a large batch in parts, which are gone through
            one after the other, so that activations and logits of one part exist at a time. By autograd too: each
            part is computed once more for its gradient.
        objective: which loss.
        micro_batch_map: computes the parts, where gradients are not needed; None: this process, in turn.

    Returns:
        The mean over all examples (candidates) or over all answer tokens (language model). That of parts is summed in
        float64, each weighted by its share; it equals the large batch's but for float rounding.

    Raises:
        ValueError: if there is no part.

    References:
        MeZO, arXiv 2305.17333, appendix E (prompts and the loss on the answer).
    """
    parts = [batch] if isinstance(batch, Batch) else list(batch)
    if not parts:
        raise ValueError("a loss needs at least one batch, got none")
    if len(parts) == 1:
        return _batch_loss(model, parts[0], objective)
    counts = torch.stack([_count(part, objective) for part in parts])
    total = torch.zeros((), dtype=torch.float64, device=counts.device)
    losses = _parts(_batch_loss, model, parts, objective, micro_batch_map, [1] * len(parts))
    for loss, share in zip(losses, counts / counts.sum(), strict=True):
        total = total + loss.reshape(()).double() * share
    return total.float()


def _parts(
    loss: Callable[[nn.Module, Batch, Objective], Tensor],
    model: nn.Module,
    parts: Sequence[Batch],
    objective: Objective,
    micro_batch_map: MicroBatchMap | None,
    sizes: Sequence[int],
) -> Iterable[Tensor]:
    """The losses of the parts of a batch, each computed when it is asked for, or micro_batch_map."""
    if micro_batch_map is not None:
        each = [functools.partial(loss, model, part, objective) for part in parts]
        return micro_batch_map(each, sizes, next(model.parameters()).device)
    if torch.is_grad_enabled():
        return (cast(Tensor, checkpoint(loss, model, part, objective, use_reentrant=False)) for part in parts)
    return (loss(model, part, objective) for part in parts)


def example_losses(
    model: nn.Module, batch: Batch | Sequence[Batch], objective: Objective, micro_batch_map: MicroBatchMap | None = None
) -> Tensor:
    """Loss of each example: float32 [n] on the model's device, in the batch's order.

    Args:
        model: a transformers causal LM.
        batch: made for this objective; or in parts, which are gone through one after the other. No part at all is a
            batch without examples.
        objective: cross-entropy over the candidates, or mean negative log-likelihood of the example's answer tokens.
            The mean over a batch of the former is ``task_loss``; the latter weighs examples equally, ``task_loss``
            their tokens.
        micro_batch_map: computes the parts, where gradients are not needed; None: this process, in turn.
    """
    parts = [batch] if isinstance(batch, Batch) else list(batch)
    none = torch.empty(0, dtype=torch.float32, device=next(model.parameters()).device)
    return torch.cat(
        [none, *_parts(_losses_of, model, parts, objective, micro_batch_map, [len(part.labels) for part in parts])]
    )


def _losses_of(model: nn.Module, batch: Batch, objective: Objective) -> Tensor:
    if objective is Objective.CANDIDATES:
        return functional.cross_entropy(candidate_scores(model, batch), batch.labels, reduction="none")
    return -_mean_log_likelihoods(model, batch)


def _count(batch: Batch, objective: Objective) -> Tensor:
    """What the loss is a mean over, float64 scalar: examples or answer tokens."""
    if objective is Objective.CANDIDATES:
        return torch.full((), len(batch.labels), dtype=torch.float64, device=batch.labels.device)
    return batch.answer_mask.sum(dtype=torch.float64)


def _batch_loss(model: nn.Module, batch: Batch, objective: Objective) -> Tensor:
    if objective is Objective.CANDIDATES:
        return functional.cross_entropy(candidate_scores(model, batch), batch.labels)
    log_likelihoods = _answer_log_likelihoods(model, batch)
    return -log_likelihoods.sum() / batch.answer_mask.sum()


def candidate_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Mean log-likelihood per token of each candidate answer, up to a constant per example: float32 [B, C]."""
    if batch.candidate_ids is not None:  # one forward serves all candidates of one token
        return _logits(model, batch, 1)[:, -1, batch.candidate_ids].float()
    return _mean_log_likelihoods(model, batch).view(len(batch.labels), -1)


def _mean_log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """Mean log-likelihood of each row's answer tokens: float32 [N]."""
    return _answer_log_likelihoods(model, batch).sum(dim=1) / batch.answer_mask.sum(dim=1)


def _answer_log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """Log-likelihood of each answer token, 0 where there is none: float32 [N, longest answer]."""
    longest = batch.answer_mask.shape[1]
    logits = _logits(model, batch, longest + 1)[:, :-1].float()
    tokens = batch.input_ids[:, -longest:]
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return torch.where(batch.answer_mask, chosen, 0.0)


def _logits(model: nn.Module, batch: Batch, keep: int) -> Tensor:
    """Logits of the last ``keep`` positions, which hold the answers, batches being padded on the left: [N, keep, V]."""
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp_(min=0)
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=positions,
        logits_to_keep=keep,
        use_cache=False,
    )
    logits = cast(Tensor, output.logits)
    if logits.shape[1] != keep:
        raise ModelError(
            f"{type(model).__name__} ignores logits_to_keep: {logits.shape[1]} positions instead of {keep}"
        )
    return logits


def language_model_loss(model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Mean next-token cross-entropy of some text, differentiable: float32 scalar.

    Args:
        model: a transformers causal LM.
        batch: int64 token ids [B, L], or a mapping with ``input_ids`` [B, L] and optionally ``attention_mask`` and
            ``labels`` (-100 where nothing is to be predicted), as tokenizers and collators make them.

    Raises:
        ModelError: if the model is no transformers causal LM, or the batch holds anything else.
    """
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    unknown = inputs.keys() - {"input_ids", "attention_mask", "labels"}
    if unknown or "input_ids" not in inputs:
        raise ModelError(f"a text batch holds input_ids, attention_mask and labels; got {', '.join(sorted(inputs))}")
    if not hasattr(model, "get_decoder"):
        raise ModelError(f"{type(model).__name__} is no transformers causal LM; give a loss of your own")
    device = next(model.parameters()).device
    input_ids = inputs["input_ids"].to(device)
    mask = inputs.get("attention_mask", torch.ones_like(input_ids)).to(device)
    labels = inputs.get("labels", input_ids).to(device)
    decoder = cast(Any, model).get_decoder()
    output = decoder(input_ids=input_ids, attention_mask=mask, use_cache=False)
    hidden = output.last_hidden_state
    scored = (mask[:, :-1] * mask[:, 1:]).bool() & (labels[:, 1:] != -100)
    hidden, targets = hidden[:, :-1][scored], labels[:, 1:][scored]
    total: Tensor = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(hidden.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
        total = total + checkpoint(_summed_loss, model, decoder, type(output), part, wanted, use_reentrant=False)
    return total / targets.numel()


def _summed_loss(
    model: nn.Module, decoder: nn.Module, kind: type[ModelOutput], hidden: Tensor, targets: Tensor
) -> Tensor:
    """Summed cross-entropy at some positions, through the model's own head (scaling and soft caps included)."""
    with _patched_forward(decoder, kind(last_hidden_state=hidden.unsqueeze(0))) as calls:
        logits = model(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
    if not calls:
        raise ModelError(
            f"{type(model).__name__} does not run its decoder through get_decoder(); its head is out of reach"
        )
    return functional.cross_entropy(logits[0].float(), targets, reduction="sum")


@contextmanager
def _patched_forward(module: nn.Module, output: ModelOutput) -> Iterator[list[None]]:
    """Within this context the module returns the given output; yields a list with an entry per call."""
    calls: list[None] = []

    def forward(*_: Any, **__: Any) -> ModelOutput:
        calls.append(None)
        return output

    module.forward = forward
    try:
        yield calls
    finally:
        del module.forward


__all__ = ["MicroBatchMap", "Objective", "candidate_scores", "example_losses", "language_model_loss", "task_loss"]
