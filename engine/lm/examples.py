"""Tokenized examples of a task: prompts, label words, and padded batches."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device_values import to_device_async
from ..errors import DataError, ModelError
from .tasks import Row, Task


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token sequences of a batch, padded on the left, so that every row ends with the answer.

    Args:
        input_ids: int64 [N, L]; N is B, or B * C if each candidate has its own row; the candidates of an example are in
            consecutive rows.
        attention_mask: int64 [N, L], 0 on padding.
        answer_mask: bool [N, longest answer], marks the answer tokens among the last positions; [N, 0] if
            ``candidate_ids`` is given.
        labels: int64 [B], class of each example.
        candidate_ids: int64 [C], token id of each candidate, if every candidate is a single token that is scored at the
            end of the prompt; else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    labels: Tensor
    candidate_ids: Tensor | None


class EncodedTask:
    """Tokenized examples of a task.

    Args:
        task: the task.
        rows: examples with the task's fields; each is checked.
        tokenizer: the model's tokenizer; pads on the left.
        max_length: maximum number of tokens of prompt and answer together.
        where: file or split that the rows come from, for error messages.
        positions: maximum number of tokens that the model can read, if it has one; see ``models.max_positions``.

    Attributes:
        prompts: token ids of each prompt, cut to fit ``max_length``.
        candidates: token ids of each label word.
        labels: int64 [n], class of each example.
        truncated: number of prompts that were cut.
        pad: id of the padding token.

    Raises:
        DataError: if a row lacks a field, its label is not one of the task's, its prompt has no tokens or does not
            fit ``max_length`` even without the field that may be cut, or prompt and answer do not fit ``positions``.
        ModelError: if the tokenizer gives two label words the same tokens, or does not keep the prompt's tokens in
            front of a label word.
    """

    def __init__(
        self,
        task: Task,
        rows: Sequence[Row],
        tokenizer: Any,
        max_length: int,
        where: str,
        positions: int | None = None,
    ) -> None:
        for number, row in enumerate(rows, 1):
            task.check(row, f"{where}, example {number}")
        self.task = task
        self.pad = int(tokenizer.pad_token_id)
        self.candidates = _candidates(task, tokenizer)
        self.labels = torch.tensor([task.class_of(row) for row in rows], dtype=torch.int64, device="cpu")
        self._tokenizer = tokenizer
        self._max_prompt = max_length - max(len(ids) for ids in self.candidates)
        encoded = _token_ids(tokenizer, task, [task.prompt(row) for row in rows])
        self.truncated = sum(len(ids) > self._max_prompt for ids in encoded)
        self.prompts: list[list[int]] = [
            ids if len(ids) <= self._max_prompt else self._truncated(row, len(ids))
            for ids, row in zip(encoded, rows, strict=True)
        ]
        self._check_lengths(where, positions)

    def _check_lengths(self, where: str, positions: int | None) -> None:
        """Raises ``DataError`` if a prompt has no tokens, or a prompt with its answer has more than ``positions``."""
        for number, prompt in enumerate(self.prompts, 1):
            if not prompt:
                raise DataError(f"{where}, example {number}: its prompt has no tokens; leave the example out")
        longest = max(map(len, self.prompts), default=0) + max(map(len, self.candidates))
        if positions is not None and longest > positions:
            raise DataError(
                f"{where}: the longest prompt and answer have {longest} tokens, and the model has {positions} "
                f"positions; give --max-length {positions}"
            )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """SHA-256 of all prompts, candidates and labels, in hexadecimal."""
        content = json.dumps([self.prompts, self.candidates, self.labels.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()

    def _truncated(self, row: Row, length: int) -> list[int]:
        """Returns the prompt's tokens after cutting the end of the field that may be cut.

        Args:
            row: the example.
            length: number of tokens of the complete prompt.

        Raises:
            DataError: if the prompt is too long even without that field.
        """
        text = row[self.task.cut].strip()
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        keep = len(offsets) - (length - self._max_prompt)
        while keep > 0:
            prompt = self.task.prompt({**row, self.task.cut: text[: offsets[keep - 1][1]]})
            (ids,) = _token_ids(self._tokenizer, self.task, [prompt])
            if len(ids) <= self._max_prompt:
                return ids
            keep -= len(ids) - self._max_prompt
        raise DataError(
            f"the prompt of task {self.task.name!r} is longer than {self._max_prompt} tokens even without the field "
            f"{self.task.cut!r}; raise --max-length"
        )

    def batch(self, indices: Sequence[int], *, answers: str, device: torch.device) -> Batch:
        """Builds a batch of the given examples.

        Args:
            indices: positions of the examples, in [0, n).
            answers: "all" to score every candidate, "gold" for the likelihood of the right one.
            device: device of the batch's tensors.
        """
        labels = self.labels[torch.as_tensor(indices, dtype=torch.int64, device="cpu")]
        if answers == "all" and all(len(ids) == 1 for ids in self.candidates):
            rows = [self.prompts[i] for i in indices]
            candidate_ids = to_device_async(_int64([ids[0] for ids in self.candidates]), device)
            answer_lengths = [0] * len(rows)
        else:
            chosen = [self.candidates if answers == "all" else [self.candidates[label]] for label in labels.tolist()]
            rows = [
                self.prompts[i] + ids
                for i, answers_of_example in zip(indices, chosen, strict=True)
                for ids in answers_of_example
            ]
            answer_lengths = [len(ids) for answers_of_example in chosen for ids in answers_of_example]
            candidate_ids = None
        width, longest = max(len(row) for row in rows), max(answer_lengths)
        input_ids = _int64([[self.pad] * (width - len(row)) + row for row in rows])
        attention = _int64([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        answer_mask = torch.arange(longest, 0, -1, device="cpu") <= _int64(answer_lengths).unsqueeze(1)
        return Batch(
            input_ids=to_device_async(input_ids, device),
            attention_mask=to_device_async(attention, device),
            answer_mask=to_device_async(answer_mask, device),
            labels=to_device_async(labels, device),
            candidate_ids=candidate_ids,
        )


def _int64(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _token_ids(tokenizer: Any, task: Task, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that begin as the task's template does.

    Where the template begins with the token that the tokenizer also puts in front of every text, such as <s>, that
    token occurs once.
    """
    encoded: list[list[int]] = tokenizer(texts)["input_ids"] if texts else []
    first = tokenizer.bos_token_id
    if first is None or not task.template.startswith(tokenizer.bos_token):
        return encoded
    return [ids[1:] if ids[:2] == [first, first] else ids for ids in encoded]


def _candidates(task: Task, tokenizer: Any) -> list[list[int]]:
    """Token ids of each label word when it follows the prompt.

    Raises:
        ModelError: see ``EncodedTask``.
    """
    probe = task.prompt(dict.fromkeys(task.fields, "a"))
    (prompt,) = _token_ids(tokenizer, task, [probe])
    # A tokenizer that ends every sequence with a special token would place it between prompt and answer.
    if prompt[-1:] != tokenizer(probe, add_special_tokens=False)["input_ids"][-1:]:
        raise ModelError("the tokenizer ends every prompt with a special token; turn this off (add_eos_token=False)")
    candidates = []
    for word in task.label_words:
        (ids,) = _token_ids(tokenizer, task, [probe + word])
        if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
            raise ModelError(
                f"the tokenizer merges the label word {word!r} with the end of the prompt of {task.name!r}; end the "
                f"template before a space or with a line break"
            )
        candidates.append(ids[len(prompt) :])
    if len({tuple(ids) for ids in candidates}) < len(candidates):
        words = ", ".join(map(repr, task.label_words))
        raise ModelError(f"the tokenizer gives two of the label words {words} of task {task.name!r} the same tokens")
    return candidates


__all__ = ["Batch", "EncodedTask"]
