"""Tokenized examples of a classification task: prompts, label words, and batches of them."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..device_values import to_device_async
from ..errors import DataError, ModelError
from .batches import Batch, Item
from .example_set import Examples
from .layout import Layout, lay_out
from .tasks import Row, Task


class EncodedTask(Examples):
    """Tokenized examples of a classification task.

    Args:
        task: the task.
        rows: examples with the task's fields; each is checked.
        tokenizer: the model's tokenizer; pads on the left.
        max_length: maximum number of tokens of prompt and answer together.
        where: file or split that the rows come from, for error messages.
        positions: maximum number of tokens that the model can read, if it has one; see ``models.max_positions``.

    Attributes:
        task: the task. For the attributes of all kinds of examples see ``Examples``.
        prompts: token ids of each prompt, cut to fit ``max_length``.
        candidates: token ids of each label word.

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
        self.task, self.name = task, task.name
        self.class_names = [word.strip() for word in task.label_words]
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
        self.lengths, self.kept = [len(ids) for ids in self.prompts], range(len(rows))
        self.overview, self.notes = (), ()
        self._positions = positions
        self._prompts = [np.array(ids, dtype=np.int64) for ids in self.prompts]
        self._candidates = [np.array(ids, dtype=np.int64) for ids in self.candidates]
        self._classes: list[int] = self.labels.tolist()
        self._items: dict[str, list[Item]] = {}  # all examples, by the answers to score
        self._candidate_ids: dict[torch.device, Tensor] = {}
        self.layout, self.layout_reason = Layout.SORTED, ""

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

    @property
    def digest(self) -> str:
        """See ``Examples``."""
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

    def items(self, indices: Sequence[int], answers: str) -> list[Item]:
        """The given examples, each with the answers to score; see ``batch``."""
        if answers not in self._items:
            every = self._candidates
            self._items[answers] = [
                Item(prompt=prompt, answers=every if answers == "all" else [every[label]])
                for prompt, label in zip(self._prompts, self._classes, strict=True)
            ]
        return [self._items[answers][i] for i in indices]

    def batch(self, indices: Sequence[int], *, answers: str, device: torch.device) -> Batch:
        """See ``Examples``."""
        labels = [self._classes[i] for i in indices]
        single = answers == "all" and all(len(ids) == 1 for ids in self.candidates)
        candidate_ids = self._single_token_ids(device) if single else None
        return lay_out(
            self.layout, self.items(indices, answers), labels, self.pad, device, candidate_ids, self._positions
        )

    @torch.inference_mode(False)  # an evaluation may be the first to need it, and backpropagation the next
    def _single_token_ids(self, device: torch.device) -> Tensor:
        """Token id of each candidate, int64 [C], sent to a device once."""
        if device not in self._candidate_ids:
            ids = torch.tensor([ids[0] for ids in self.candidates], dtype=torch.int64, device="cpu")
            self._candidate_ids[device] = to_device_async(ids, device)
        return self._candidate_ids[device]

    def layout_items(self) -> list[Item]:
        """See ``Examples``."""
        return self.items(range(len(self)), "all")


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


__all__ = ["EncodedTask"]
