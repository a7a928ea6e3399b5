"""Losses of predicting tokens of a text from its hidden states: on pre-training text, and on free-text answers.

A model's head runs on the scored positions only, 128 of them at a time: a tensor [batch, length, vocabulary] never
exists.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import DataError, ModelError
from .batches import TextBatch
from .causal import causal_lm, position_ids
from .scored_batches import ScoredBatch

# Positions whose logits exist at a time: 128 x 128,256 in float32 is 66 MB.
_POSITIONS = 128


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
        hidden, kind = batch.rows.hidden_states(lm)
        return _mean_loss(lm, kind, hidden[batch.rows.scored], batch.targets)
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
    """Mean cross-entropy at some positions, whose logits exist for 128 positions at a time; see ``_head_loss``."""
    total: Tensor = hidden.new_zeros((), dtype=torch.float32)
    for part in _head_losses(lm, kind, hidden, targets, "sum"):
        total = total + part
    return total / targets.numel()


def _head_losses(
    lm: PreTrainedModel, kind: type[ModelOutput], hidden: Tensor, targets: Tensor, reduction: Literal["sum", "none"]
) -> Iterator[Tensor]:
    """Yields the cross-entropy of 128 positions at a time; see ``_head_loss``."""
    decoder = cast(Any, lm).get_decoder()
    for hidden_part, targets_part in zip(hidden.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
        arguments = lm, decoder, kind, hidden_part, targets_part, reduction
        if torch.is_grad_enabled():
            yield cast(Tensor, checkpoint(_head_loss, *arguments, use_reentrant=False))
        else:  # a checkpoint reads the state of the random generators, which a CUDA graph cannot
            yield _head_loss(*arguments)


def token_losses(model: nn.Module, batch: ScoredBatch) -> Tensor:
    """Cross-entropy of each token that a batch asks for: float32 [T], in the batch's order, differentiable.

    Args:
        model: a transformers causal LM; see ``causal.causal_lm``.
        batch: the texts.

    Raises:
        ModelError: if the model is no transformers causal LM, or its head cannot be run alone.
    """
    lm = causal_lm(model)
    hidden, kind = batch.rows.hidden_states(lm)
    return torch.cat(list(_head_losses(lm, kind, hidden.index_select(0, batch.places), batch.tokens, "none")))


def _differentiable(tensor: Tensor) -> Tensor:
    """Returns a tensor that autograd can save, also if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def _head_loss(
    model: nn.Module,
    decoder: nn.Module,
    kind: type[ModelOutput],
    hidden: Tensor,
    targets: Tensor,
    reduction: Literal["sum", "none"],
) -> Tensor:
    """Cross-entropy at some positions, through the model's own head, including its scaling and soft caps.

    Args:
        model: a transformers causal LM.
        decoder: the model's decoder, ``model.get_decoder()``.
        kind: class of the decoder's output.
        hidden: the decoder's last hidden states [positions, width].
        targets: int64 token ids [positions].
        reduction: see ``functional.cross_entropy``.

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
    return functional.cross_entropy(logits[0].float(), targets, reduction=reduction)


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


__all__ = ["language_model_loss", "token_losses"]
