"""``ScoredBatch``: texts of which some tokens are predicted, in the rows of a layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .batches import Item, PackedTokens, pad_rows, row_layout, send
from .layout import Layout
from .packing import parts_of_like_length
from .rows import PackedRows, PaddedRows, Rows, SortedRows

# On a GPU, numbers of tokens are rounded up so that fewer shapes occur: a graph of a step is captured for each shape.
_GPU_TOKENS, _GPU_LONGEST = 256, 64


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A text as tokens, some of which are predicted.

    Args:
        ids: int64 [n].
        scored: places of the tokens to predict, ascending, in [1, n); int64 [m], m at least 1.
    """

    ids: npt.NDArray[np.int64]
    scored: npt.NDArray[np.int64]

    @property
    def length(self) -> int:
        """Number of tokens that a forward pass reads: those before the last one that is predicted."""
        return int(self.scored[-1])

    def item(self) -> Item:
        """The text as a prompt and one answer, which begins at the first token to predict."""
        first, last = int(self.scored[0]), int(self.scored[-1])
        return Item(prompt=self.ids[:first], answers=[self.ids[first : last + 1]])


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """Texts in rows, and the tokens to predict in them.

    Args:
        rows: the tokens; their forward pass returns hidden states [P, width].
        places: int64 [T], place among the hidden states that predicts each token.
        tokens: int64 [T]. On a GPU, T is rounded up; what is added has no meaning.
        order: int64 [B, A], the tokens of each text, as places in [0, T); A is at least the largest number of them.
        lengths: int64 [B], number of tokens to predict of each text; what follows in ``order`` has no meaning.
    """

    rows: Rows
    places: Tensor
    tokens: Tensor
    order: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.lengths)

    def by_text(self, losses: Tensor) -> Tensor:
        """Arranges the losses of the tokens, [T], by text; 0 where there is none: [B, A]."""
        longest = torch.arange(self.order.shape[1], dtype=torch.int64, device=self.order.device)
        return torch.where(longest < self.lengths[:, None], losses[self.order], 0.0)


def scored_batch(
    layout: Layout, texts: Sequence[ScoredText], padding: int, device: torch.device, limit: int | None = None
) -> ScoredBatch:
    """Lays out texts.

    Args:
        layout: the layout, not ``AUTO``.
        texts: the texts, at least one.
        padding: id of the padding token.
        device: device of the tensors.
        limit: see ``batches.packed_batch``.
    """
    if layout is Layout.PACKED:
        arrays, starts = _packed(texts, device, limit)
    else:
        arrays, starts = _in_parts(texts, padding, sort=layout is Layout.SORTED)
    places = np.concatenate([start + text.scored - 1 for start, text in zip(starts, texts, strict=True)])
    tokens = np.concatenate([text.ids[text.scored] for text in texts])
    lengths = np.array([len(text.scored) for text in texts], dtype=np.int64)
    longest = int(lengths.max())
    if device.type == "cuda":
        places, tokens = (np.pad(array, (0, -len(array) % _GPU_TOKENS)) for array in (places, tokens))
        longest += -longest % _GPU_LONGEST
    order = np.zeros((len(texts), longest), dtype=np.int64)
    first = np.cumsum(lengths) - lengths
    for row, start, length in zip(order, first, lengths, strict=True):
        row[:length] = np.arange(start, start + length)
    *sent, places_, tokens_, order_, lengths_ = send([*arrays, places, tokens, order, lengths], device)
    rows = _packed_rows(sent, places_) if layout is Layout.PACKED else _padded_rows(sent)
    return ScoredBatch(rows=rows, places=places_, tokens=tokens_, order=order_, lengths=lengths_)


def _packed(
    texts: Sequence[ScoredText], device: torch.device, limit: int | None
) -> tuple[list[npt.NDArray[np.int64]], list[int]]:
    """The arrays of packed rows, and the place of each text's first token in the flattened rows."""
    items = [Item(prompt=text.ids[: text.length], answers=[]) for text in texts]
    rows = PackedTokens(items, *row_layout([text.length for text in texts], device, limit))
    return [rows.ids, rows.positions, rows.until], rows.starts


def _packed_rows(arrays: Sequence[Tensor], places: Tensor) -> PackedRows:
    ids, positions, until = arrays
    return PackedRows(input_ids=ids, position_ids=positions, attended_until=until, scored=places)


def _in_parts(
    texts: Sequence[ScoredText], padding: int, *, sort: bool
) -> tuple[list[npt.NDArray[np.int64]], list[int]]:
    """The arrays of one text a row, padded on the left, in one or several parts; and the place of each first token."""
    lengths = [text.length for text in texts]
    parts = parts_of_like_length(lengths) if sort else [list(range(len(texts)))]
    arrays: list[npt.NDArray[np.int64]] = []
    starts, before = [0] * len(texts), 0
    for part in parts:
        ids, mask = pad_rows([texts[i].ids[: lengths[i]] for i in part], padding)
        arrays += [ids, mask]
        width = ids.shape[1]
        for row, i in enumerate(part):
            starts[i] = before + (row + 1) * width - lengths[i]
        before += ids.size
    return arrays, starts


def _padded_rows(arrays: Sequence[Tensor]) -> PaddedRows | SortedRows:
    parts = tuple(
        PaddedRows(input_ids=ids, attention_mask=mask, keep=ids.shape[1])
        for ids, mask in zip(arrays[::2], arrays[1::2], strict=True)
    )
    return parts[0] if len(parts) == 1 else SortedRows(parts=parts)


__all__ = ["ScoredBatch", "ScoredText", "scored_batch"]
