"""Held-out loss of a model on free text, and scores of the answers that it generates."""

from collections.abc import Sequence

import torch
from torch import nn

from .free_text.encoded import EncodedText
from .generation import generate
from .text_loss import token_losses
from .text_metrics import Metric, score_texts


def examples_per_batch(device: torch.device) -> int:
    """Number of examples of an evaluation's batch. A GPU needs large batches to be busy."""
    return 256 if device.type == "cuda" else 32


@torch.inference_mode()
def held_out_loss(model: nn.Module, data: EncodedText, batch_size: int | None = None) -> tuple[float, int]:
    """Computes the loss, in batches of similar length. The host waits for the device once, at the end.

    Args:
        model: a transformers causal LM.
        data: the examples.
        batch_size: number of examples per batch; None: 32 on a CPU, 256 on a GPU.

    Returns:
        The mean negative log-likelihood of all answer tokens, summed in float64, NaN or infinite if that of an example
        is; and the number of these examples.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(data)), key=lambda i: data.lengths[i])
    size = batch_size or examples_per_batch(device)
    sums = []
    for start in range(0, len(order), size):
        batch = data.batch(order[start : start + size], answers="gold", device=device)
        sums.append(batch.by_text(token_losses(model, batch)).sum(dim=1, dtype=torch.float64))
    by_example = torch.cat(sums).cpu()
    return float(by_example.sum()) / data.answer_tokens, int((~by_example.isfinite()).sum())


def generate_answers(
    model: nn.Module, data: EncodedText, max_new_tokens: int, batch_size: int | None = None
) -> list[str]:
    """The most likely answer to each example's prompt, without special tokens and surrounding white space.

    Args:
        model: a transformers causal LM.
        data: the examples.
        max_new_tokens: maximum number of tokens of an answer.
        batch_size: see ``generation.generate``.
    """
    answers = generate(
        model,
        [data.prompt_ids(i) for i in range(len(data))],
        pad=data.pad,
        end=data.end_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return [str(data.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]


def generated_scores(
    model: nn.Module, data: EncodedText, metrics: Sequence[str | Metric], max_new_tokens: int
) -> dict[str, float]:
    """Compares generated answers with the acceptable ones; see ``generate_answers`` and ``text_metrics.score_texts``.

    Args:
        model: a transformers causal LM.
        data: the examples.
        metrics: the metrics.
        max_new_tokens: maximum number of tokens of an answer.
    """
    references = [data.references(i) for i in range(len(data))]
    return score_texts(generate_answers(model, data, max_new_tokens), references, metrics)


__all__ = ["examples_per_batch", "generate_answers", "generated_scores", "held_out_loss"]
