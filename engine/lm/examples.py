"""A task's examples as token ids: prompts, label words, and padded batches of them."""

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
    """Token sequences of a batch, padded on the left, so that the answers stand at the end of every row.

    Args:
        input_ids: int64 [N, L]; N is B, or B * C with the candidates of an example in consecutive rows.
        attention_mask: int64 [N, L], 0 on padding.
        answer_mask: bool [N, longest answer], the answer tokens among the last positions; [N, 0] with candidate_ids.
        labels: int64 [B].
        candidate_ids: int64 [C] if every candidate is one token and is scored after the prompt; else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    labels: Tensor
    candidate_ids: Tensor | None


class EncodedTask:
    """The examples of a task as token ids.

    Args:
        task: of the rows.
        rows: with the task's fields; checked.
        tokenizer: of the model; pads on the left.
        max_length: tokens of prompt and answer together, at most.
        where: of the rows, for error messages.

    Raises:
        DataError: if a row lacks a field, or its label is outside the task.
        ModelError: if the tokenizer cannot tell the label words apart or does not keep the prompt's tokens before them.
    """

    def __init__(self, task: Task, rows: Sequence[Row], tokenizer: Any, max_length: int, where: str) -> None:
        for number, row in enumerate(rows, 1):
            task.check(row, f"{where}, example {number}")
        self.task = task
        self.pad = int(tokenizer.pad_token_id)
        self.candidates = _candidates(task, tokenizer)
        self.labels = torch.tensor([task.class_of(row) for row in rows], dtype=torch.int64)
        self._tokenizer = tokenizer
        self._room = max_length - max(len(ids) for ids in self.candidates)
        encoded = tokenizer([task.prompt(row) for row in rows])["input_ids"] if rows else []
        self.truncated = sum(len(ids) > self._room for ids in encoded)
        self.prompts: list[list[int]] = [
            ids if len(ids) <= self._room else self._truncated(row, len(ids))
            for ids, row in zip(encoded, rows, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """SHA-256 of all prompts, candidates and labels, in hexadecimal."""
        known = json.dumps([self.prompts, self.candidates, self.labels.tolist()])
        return hashlib.sha256(known.encode()).hexdigest()

    def _truncated(self, row: Row, length: int) -> list[int]:
        """The prompt's tokens after cutting the end of the field that may be cut."""
        text = row[self.task.cut].strip()
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        keep = len(offsets) - (length - self._room)
        while keep > 0:
            prompt = self.task.prompt({**row, self.task.cut: text[: offsets[keep - 1][1]]})
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
            if len(ids) <= self._room:
                return ids
            keep -= len(ids) - self._room
        raise DataError(
            f"the prompt of task {self.task.name!r} is longer than {self._room} tokens even without the field "
            f"{self.task.cut!r}; raise --max-length"
        )

    def batch(self, indices: Sequence[int], *, answers: str, device: torch.device) -> Batch:
        """A batch of some examples.

        Args:
            indices: of the examples.
            answers: "all" to score every candidate, "gold" for the likelihood of the right one.
            device: of the tensors.
        """
        labels = self.labels[torch.as_tensor(indices)]
        if answers == "all" and all(len(ids) == 1 for ids in self.candidates):
            rows = [self.prompts[i] for i in indices]
            candidate_ids = to_device_async(torch.tensor([ids[0] for ids in self.candidates]), device)
            tails = [0] * len(rows)
        else:
            chosen = [self.candidates if answers == "all" else [self.candidates[label]] for label in labels.tolist()]
            rows = [self.prompts[i] + ids for i, answer in zip(indices, chosen, strict=True) for ids in answer]
            tails = [len(ids) for answer in chosen for ids in answer]
            candidate_ids = None
        width, tail = max(len(row) for row in rows), max(tails)
        input_ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in rows])
        attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        answer_mask = torch.arange(tail, 0, -1) <= torch.tensor(tails).unsqueeze(1)
        return Batch(
            input_ids=to_device_async(input_ids, device),
            attention_mask=to_device_async(attention, device),
            answer_mask=to_device_async(answer_mask, device),
            labels=to_device_async(labels, device),
            candidate_ids=candidate_ids,
        )


def _candidates(task: Task, tokenizer: Any) -> list[list[int]]:
    """Token ids of each label word as they follow the prompt."""
    probe = task.prompt(dict.fromkeys(task.fields, "a"))
    prompt = tokenizer(probe)["input_ids"]
    # A tokenizer that ends sequences with a special token would put it between prompt and answer.
    if prompt[-1:] != tokenizer(probe, add_special_tokens=False)["input_ids"][-1:]:
        raise ModelError("the tokenizer ends every prompt with a special token; turn that off (add_eos_token=False)")
    found = []
    for word in task.label_words:
        ids = tokenizer(probe + word)["input_ids"]
        if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
            raise ModelError(
                f"the tokenizer merges the label word {word!r} with the end of the prompt of {task.name!r}"
            )
        found.append(ids[len(prompt) :])
    if len({tuple(ids) for ids in found}) < len(found):
        words = ", ".join(map(repr, task.label_words))
        raise ModelError(f"the tokenizer gives two of the label words {words} of task {task.name!r} the same tokens")
    return found


__all__ = ["Batch", "EncodedTask"]
