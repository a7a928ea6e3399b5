"""Layouts of a batch, and the check that a model computes the same with several sequences in a row."""

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .batches import Batch, Item, packed_batch, padded_batch, sorted_batch
from .padding_probe import BATCHED

# Change of the logits that may be rounding, in units of their standard deviation: a few times that of the same examples
# in a padded batch, but at least this, and never more than what is a fault of padding too (``BATCHED``).
_ROUNDING, _TIMES = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}, 3


class Layout(StrEnum):
    """How the sequences of a batch are laid out in rows.

    ``AUTO``: packed where the model computes the same with it, else sorted.
    ``PACKED``: several examples a row, each attending to itself alone; the candidates of an example share its prompt.
    ``SORTED``: one sequence a row, in up to four forward passes over sequences of like length.
    ``PADDED``: one sequence a row, in one forward pass.
    """

    AUTO = "auto"
    PACKED = "packed"
    SORTED = "sorted"
    PADDED = "padded"


def lay_out(
    layout: Layout,
    items: Sequence[Item],
    labels: Sequence[int],
    padding: int,
    device: torch.device,
    candidate_ids: Tensor | None = None,
    limit: int | None = None,
) -> Batch:
    """Makes a batch.

    Args:
        layout: the layout, not ``AUTO``.
        items: the examples, at least one.
        labels: their classes.
        padding: id of the padding token.
        device: device of the tensors.
        candidate_ids: see ``Batch``.
        limit: see ``packed_batch``.
    """
    if layout is Layout.PACKED:
        return packed_batch(items, labels, device, candidate_ids, limit)
    make = sorted_batch if layout is Layout.SORTED else padded_batch
    return make(items, labels, padding, device, candidate_ids)


def resolve_layout(layout: Layout, model: nn.Module, items: Sequence[Item], padding: int) -> tuple[Layout, str]:
    """Chooses the layout for a model, after comparing packed rows with single sequences.

    Args:
        layout: the layout that is wanted.
        model: a transformers causal LM in evaluation mode; it does not change.
        items: the examples. The shortest, the longest and the median one are compared.
        padding: id of the padding token.

    Returns:
        The layout, not ``AUTO``; and why it is not packed, empty if it is or was not to be.

    Raises:
        ConfigError: if ``PACKED`` is wanted, and the model computes something else with it.
    """
    if layout not in (Layout.AUTO, Layout.PACKED) or not items:
        return (Layout.SORTED if layout is Layout.AUTO else layout), ""
    by_length = sorted(items, key=lambda item: item.length)
    reason = _difference(model, [by_length[0], by_length[-1], by_length[len(by_length) // 2]], padding)
    if not reason:
        return Layout.PACKED, ""
    if layout is Layout.PACKED:
        raise ConfigError(f"layout packed does not fit this model: {reason}; use layout auto or sorted")
    return Layout.SORTED, reason


@torch.no_grad()
def _difference(model: nn.Module, items: Sequence[Item], padding: int) -> str:
    """Compares the logits of examples in one packed row with those of each example alone.

    Returns:
        What is different, for a message; empty if nothing is.
    """
    parameter = next(model.parameters())
    device = parameter.device
    labels = [0] * len(items)
    alone = torch.cat([_logits(model, padded_batch([item], [0], padding, device, None)) for item in items])
    rounding = _change(_logits(model, padded_batch(items, labels, padding, device, None)), alone)
    try:
        packed = _logits(model, packed_batch(items, labels, device, None, in_one_row=True))
    except Exception as error:  # a model that does not know such masks fails in a way of its own
        return (
            f"{type(model).__name__} takes no rows of several examples ({type(error).__name__}: {_first_line(error)})"
        )
    change, dtype = _change(packed, alone), parameter.dtype
    if change <= min(max(_TIMES * rounding, _ROUNDING[dtype]), BATCHED[dtype]):
        return ""
    return (
        f"in a row with other examples the scores of {type(model).__name__} move by {change:.2g} of their standard "
        f"deviation, in a padded batch by {rounding:.2g}"
    )


def _change(logits: Tensor, reference: Tensor) -> float:
    """Largest change of a position's logits, [n, V], in units of their standard deviation; may be NaN."""
    return float(((logits - reference).square().mean(1).sqrt() / reference.std(1)).max())


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at all answer tokens, in the order of the answers: float32 [n, V]."""
    return batch.rows.logits(model).float()[batch.answer_places[batch.answer_mask]]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


__all__ = ["Layout", "lay_out", "resolve_layout"]
