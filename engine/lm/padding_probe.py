"""Checks that left padding leaves a model's scores as they are, by scoring a few short sequences alone and in a batch.

Prompts of different lengths are scored in batches padded on the left. That is right for attention whose mask covers the
padding and whose positions come from the caller. It is wrong for some recurrent models, which read the padding like
text, and for models that count positions from the first padding token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .rows import PaddedRows

# Largest change of the scores in units of their standard deviation, root mean square over the vocabulary. A batch of
# another shape changes float32 scores by 1e-5 at most in the architectures tried, and other padding in a batch of the
# same shape only those of mixtures of experts; see the tests.
BATCHED = {torch.float32: 3e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_OTHER_PADDING = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@torch.no_grad()
def check_padding(model: nn.Module, token_ids: Sequence[int], padding: int, dtype: torch.dtype) -> None:
    """Checks that scores after a prompt do not depend on the padding in front of it. The model does not change.

    The first third, the first two thirds and all of the tokens are scored one by one, as one batch padded on the left,
    and as that batch with another token as padding. Scores that are not finite are not compared.

    Args:
        model: a transformers causal LM in evaluation mode.
        token_ids: ids of a text of at least 3 tokens.
        padding: id of the padding token.
        dtype: dtype of the model's weights.

    Raises:
        ModelError: if the scores of padded sequences change.
    """
    rows = [list(token_ids[: len(token_ids) * part // 3]) for part in (1, 2, 3)]
    alone = torch.cat([_scores(model, [row], padding) for row in rows])
    batched = _scores(model, rows, padding)
    other = _scores(model, rows, next(token for token in (*token_ids, padding + 1) if token != padding))
    changes = (
        (_change(batched, alone), BATCHED[dtype], "in a batch that is padded on the left"),
        (_change(other, batched), _OTHER_PADDING[dtype], "with another padding token"),
    )
    for change, tolerance, where in changes:
        if change > tolerance:
            raise ModelError(
                f"left padding changes the scores of {type(model).__name__}: {where} they move by {change:.2g} of "
                f"their standard deviation, so prompts of different lengths cannot be scored in batches; use a model "
                f"whose attention masks its padding"
            )


def _change(scores: Tensor, reference: Tensor) -> float:
    """Change of the padded rows' scores over their standard deviation; the smaller one of the two rows.

    One row alone may change by chance: rounding can send a token to other experts of a mixture.

    Args:
        scores: float32 [3, V]; the last row is not padded.
        reference: float32 [3, V].
    """
    difference = (scores - reference)[:-1]
    return float((difference.square().mean(dim=1).sqrt() / reference[:-1].std(dim=1)).min())


def _scores(model: nn.Module, rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """Logits after each row: float32 [rows, V]."""
    device = next(model.parameters()).device
    width = max(map(len, rows))

    def integers(values: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    padded = PaddedRows(
        input_ids=integers([[padding] * (width - len(row)) + list(row) for row in rows]),
        attention_mask=integers([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        keep=1,
    )
    return padded.logits(model).float()


__all__ = ["BATCHED", "check_padding"]
