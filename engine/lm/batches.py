"""``Batch``: prompts and answers as tensors, and the ways to lay them out in rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..device_values import to_device_async
from .packing import pack, parts_of_like_length
from .rows import PackedRows, PaddedRows, Rows, SortedRows

_Tokens = npt.NDArray[np.int64]
# On a GPU, widths are rounded up so that few shapes occur: a graph of a step is captured for each shape.
_GPU_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Item:
    """One example as tokens.

    Args:
        prompt: int64 [n], n at least 1.
        answers: answers to score after the prompt; int64 [m], m at least 1, each.
    """

    prompt: _Tokens
    answers: Sequence[_Tokens]

    @cached_property
    def length(self) -> int:
        """Number of tokens that a forward pass reads, the prompt once: nothing is predicted from an answer's last."""
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples in rows, and where their answers are.

    Args:
        rows: the tokens; their forward pass returns logits [P, V].
        answer_places: int64 [S, A], place among the logits that predicts each answer token; S is B, or B * C if the
            candidates of an example are scored (consecutively); A is the length of the longest answer.
        answer_tokens: int64 [S, A].
        answer_lengths: int64 [S], number of tokens of each answer; what follows in the two above has no meaning.
        labels: int64 [B], class of each example.
        candidate_ids: int64 [C], token id of each candidate, if every candidate is a single token. Then S is 0, and the
            logits are those after each prompt, [B, V].
    """

    rows: Rows
    answer_places: Tensor
    answer_tokens: Tensor
    answer_lengths: Tensor
    labels: Tensor
    candidate_ids: Tensor | None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def answer_mask(self) -> Tensor:
        """Where there is an answer token: bool [S, A]."""
        longest = self.answer_tokens.shape[1]
        return torch.arange(longest, device=self.labels.device, dtype=torch.int64) < self.answer_lengths[:, None]


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """Texts in packed rows, without their last tokens, from which nothing is predicted.

    Args:
        rows: the tokens; every one of them is scored.
        targets: int64 [P], the token after each scored place.
    """

    rows: PackedRows
    targets: Tensor


def text_batch(texts: Sequence[_Tokens], device: torch.device, limit: int | None = None) -> TextBatch:
    """Lays out several texts a row.

    Args:
        texts: token ids, int64 [n] with n at least 2 each.
        device: device of the tensors.
        limit: see ``packed_batch``.
    """
    rows = PackedTokens(
        [Item(prompt=text[:-1], answers=[]) for text in texts], *row_layout([len(t) - 1 for t in texts], device, limit)
    )
    scored = np.concatenate(
        [np.arange(start, start + len(text) - 1) for start, text in zip(rows.starts, texts, strict=True)]
    )
    arrays = [rows.ids, rows.positions, rows.until, scored, np.concatenate([text[1:] for text in texts])]
    ids, positions, until, places, targets = send(arrays, device)
    packed = PackedRows(input_ids=ids, position_ids=positions, attended_until=until, scored=places)
    return TextBatch(rows=packed, targets=targets)


def padded_batch(
    items: Sequence[Item], labels: Sequence[int], padding: int, device: torch.device, candidate_ids: Tensor | None
) -> Batch:
    """Lays out one row per answer, padded on the left.

    Args:
        items: the examples.
        labels: their classes.
        padding: id of the padding token.
        device: device of the tensors.
        candidate_ids: see ``Batch``; then every example is one row.
    """
    return _in_parts(items, labels, padding, device, candidate_ids, lambda lengths: [list(range(len(lengths)))])


def sorted_batch(
    items: Sequence[Item], labels: Sequence[int], padding: int, device: torch.device, candidate_ids: Tensor | None
) -> Batch:
    """Lays out one row per answer, in up to four parts of like length; see ``padded_batch``."""
    return _in_parts(items, labels, padding, device, candidate_ids, parts_of_like_length)


def _in_parts(
    items: Sequence[Item],
    labels: Sequence[int],
    padding: int,
    device: torch.device,
    candidate_ids: Tensor | None,
    cut: Callable[[Sequence[int]], list[list[int]]],
) -> Batch:
    single = candidate_ids is not None
    sequences = [(item.prompt, answer) for item in items for answer in item.answers[: 1 if single else None]]
    keep = max(len(answer) for _, answer in sequences)
    parts = cut([len(prompt) + len(answer) - 1 for prompt, answer in sequences])
    order = np.empty((len(sequences), keep), dtype=np.int64)
    order[[i for part in parts for i in part]] = np.arange(order.size).reshape(order.shape)
    tokens, lengths = _answers([] if single else [answer for _, answer in sequences])
    # An answer's tokens are predicted at the last of the positions that are kept.
    places = np.zeros_like(tokens)
    for i, length in enumerate(lengths.tolist()):
        places[i, :length] = range((i + 1) * keep - length, (i + 1) * keep)
    read = [np.concatenate([prompt, answer[:-1]]) for prompt, answer in sequences]
    arrays = [array for part in parts for array in pad_rows([read[i] for i in part], padding)]
    *rows, order_, places_, tokens_, lengths_, labels_ = send(
        [*arrays, order.ravel(), places, tokens, lengths, _array(labels)], device
    )
    padded = tuple(
        PaddedRows(input_ids=ids, attention_mask=mask, keep=keep)
        for ids, mask in zip(rows[::2], rows[1::2], strict=True)
    )
    return Batch(
        rows=padded[0] if len(padded) == 1 else SortedRows(parts=padded, order=order_),
        answer_places=places_, answer_tokens=tokens_, answer_lengths=lengths_, labels=labels_,
        candidate_ids=candidate_ids,
    )  # fmt: skip


def pad_rows(sequences: Sequence[_Tokens], padding: int) -> tuple[_Tokens, _Tokens]:
    """Token ids and attention mask, [N, L] each, of one sequence a row, padded on the left."""
    width = max(map(len, sequences))
    ids = np.full((len(sequences), width), padding, dtype=np.int64)
    attention = np.zeros_like(ids)
    for row, mask, sequence in zip(ids, attention, sequences, strict=True):
        start = width - len(sequence)
        row[start:] = sequence
        mask[start:] = 1
    return ids, attention


def packed_batch(
    items: Sequence[Item],
    labels: Sequence[int],
    device: torch.device,
    candidate_ids: Tensor | None,
    limit: int | None = None,
    *,
    in_one_row: bool = False,
) -> Batch:
    """Lays out several examples a row, the answers of an example as continuations of one copy of its prompt.

    Args:
        items: the examples.
        labels: their classes.
        device: device of the tensors.
        candidate_ids: see ``Batch``.
        limit: largest width of a row, such as the number of positions of the model; None: no limit.
        in_one_row: whether all examples go into one row, in their order.
    """
    lengths = [item.length for item in items]
    layout = (sum(lengths), [list(range(len(items)))]) if in_one_row else row_layout(lengths, device, limit)
    rows = PackedTokens(items, *layout)
    single = candidate_ids is not None
    tokens, answer_lengths = _answers([] if single else [answer for item in items for answer in item.answers])
    places = np.zeros_like(tokens)
    for i, at in enumerate([] if single else rows.places):
        places[i, : len(at)] = at
    scored = _array(rows.scored)
    if device.type == "cuda" and not single:  # as many as there can be
        scored = np.pad(scored, (0, tokens.size - len(scored)))
    arrays = [rows.ids, rows.positions, rows.until, scored, places, tokens, answer_lengths, _array(labels)]
    ids_, positions_, until_, scored_, places_, tokens_, lengths_, labels_ = send(arrays, device)
    return Batch(
        rows=PackedRows(input_ids=ids_, position_ids=positions_, attended_until=until_, scored=scored_),
        answer_places=places_, answer_tokens=tokens_, answer_lengths=lengths_, labels=labels_,
        candidate_ids=candidate_ids,
    )  # fmt: skip


def row_layout(lengths: Sequence[int], device: torch.device, limit: int | None) -> tuple[int, list[list[int]]]:
    """Width of packed rows on a device, and the sequences in each row; see ``packing.pack``."""
    return pack(lengths, _GPU_WIDTH if device.type == "cuda" else 1, limit)


class PackedTokens:
    """Arrays of packed rows.

    Args:
        items: the examples.
        width: width of the rows.
        rows: the examples in each row.

    Attributes:
        ids, positions, until: int64 [R, W], see ``PackedRows``. Padding attends to itself.
        starts: place of each example's first token in the flattened rows.
        scored: places in the flattened rows that predict an answer token, in the order of the examples.
        places: for each answer, the indices in ``scored`` that predict its tokens.
    """

    def __init__(self, items: Sequence[Item], width: int, rows: Sequence[Sequence[int]]) -> None:
        shape = (len(rows), width)
        self.ids = np.zeros(shape, dtype=np.int64)
        self.positions = np.zeros(shape, dtype=np.int64)
        self.until = np.broadcast_to(np.arange(1, width + 1, dtype=np.int64), shape).copy()
        self.scored: list[int] = []
        self.places: list[list[int]] = []
        self.starts = [0] * len(items)
        for r, members in enumerate(rows):
            start = r * width
            for i in members:
                self.starts[i] = start
                start += items[i].length
        counting = np.arange(width, dtype=np.int64)
        for start, item in zip(self.starts, items, strict=True):
            self._put(item, *divmod(start, width), counting)

    def _put(self, item: Item, row: int, start: int, counting: _Tokens) -> None:
        """Writes an example into a row, its answers without their last tokens."""
        ids, positions, until = self.ids[row], self.positions[row], self.until[row]
        n, end, flat = len(item.prompt), start + item.length, row * self.ids.shape[1]
        ids[start : start + n] = item.prompt
        positions[start : start + n] = counting[:n]
        until[start : start + n] = end
        after_prompt, at = len(self.scored), start + n
        self.scored.append(flat + at - 1)
        for answer in item.answers:
            m = len(answer) - 1
            self.places.append([after_prompt, *range(len(self.scored), len(self.scored) + m)])
            if m:
                ids[at : at + m] = answer[:-1]
                positions[at : at + m] = counting[n : n + m]
                until[at : at + m] = at + m
                self.scored.extend(range(flat + at, flat + at + m))
                at += m


def _answers(answers: Sequence[_Tokens]) -> tuple[_Tokens, _Tokens]:
    """Tokens [S, A], padded on the right, and lengths [S] of answers."""
    lengths = _array([len(answer) for answer in answers])
    tokens = np.zeros((len(answers), max(map(len, answers), default=0)), dtype=np.int64)
    for i, answer in enumerate(answers):
        tokens[i, : len(answer)] = answer
    return tokens, lengths


def _array(values: Sequence[int]) -> _Tokens:
    return np.array(values, dtype=np.int64)


def send(arrays: Sequence[_Tokens], device: torch.device) -> list[Tensor]:
    """Sends arrays to a device in one transfer. Returns tensors of their shapes."""
    flat = to_device_async(torch.from_numpy(np.concatenate([array.ravel() for array in arrays])), device)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


__all__ = [
    "Batch",
    "Item",
    "PackedTokens",
    "TextBatch",
    "packed_batch",
    "pad_rows",
    "padded_batch",
    "row_layout",
    "send",
    "sorted_batch",
    "text_batch",
]
