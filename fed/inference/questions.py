"""``Questions``: prompts as a model reads them, and what it predicts: probabilities of label words, or text."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from ...engine.errors import DataError
from ...engine.lm.examples import EncodedTask
from ...engine.lm.free_text.task import TextTask
from ...engine.lm.generation import Sampling, generate
from ...engine.lm.models import LanguageModel, max_positions
from ...engine.lm.objective import candidate_scores
from ...engine.lm.row_files import LocatedRows
from ...engine.lm.tasks import Task
from ..setup.data import encode_rows, renderer
from .prompts import contents, with_answer
from .target import Target

_BATCH_SIZE = 32


@dataclass(frozen=True)
class Choice:
    """Probability of each label word, in [0, 1]; NaN if the model's scores are not finite."""

    probabilities: dict[str, float]

    @property
    def best(self) -> str | None:
        """The most likely label word; None if the scores are not finite."""
        if any(math.isnan(value) for value in self.probabilities.values()):
            return None
        return max(self.probabilities, key=self.probabilities.__getitem__)


@dataclass(frozen=True)
class Answer:
    """A generated text, without special tokens and surrounding white space."""

    text: str


Prediction = Choice | Answer


class Questions(ABC):
    """Prompts as a model reads them.

    Attributes:
        cut: number of prompts that were too long and have been cut.
    """

    cut: int

    @abstractmethod
    def prompt(self, i: int) -> str:
        """The text of a prompt, with special tokens, but without the one that begins every text."""

    @abstractmethod
    def predict(self, lm: LanguageModel) -> list[Prediction]:
        """What the model, with the weights that it has now, predicts for each prompt."""


class Choices(Questions):
    """Prompts of a classification task.

    Args:
        target: the model and its task.
        rows: the rows; their labels are not read.
        name: name of the rows, for messages.

    Raises:
        DataError: if a row does not fit the task, or its prompt has no tokens.
    """

    def __init__(self, target: Target, rows: LocatedRows, name: str) -> None:
        task = target.config.task
        assert isinstance(task, Task)
        for row, where in zip(rows, rows.places, strict=True):
            for field in task.fields:
                if field not in row:
                    raise DataError(
                        f"{where}: the prompt needs the field {field!r}; found {', '.join(sorted(row)) or 'no fields'}"
                    )
        labelled = LocatedRows([dict(with_answer(task, row)) for row in rows], rows.places)
        for row, where in zip(labelled, rows.places, strict=True):
            task.check(row, where)
        length, positions = target.config.data.max_length, max_positions(target.lm.model)
        config = target.config.replace(max_length=length if positions is None else min(length, positions))
        data = encode_rows(config, target.lm, labelled, name)
        assert isinstance(data, EncodedTask)
        data.resolve_layout(target.config.step.layout, target.lm.model)
        self._data, self._tokenizer, self.cut = data, target.lm.tokenizer, data.truncated

    def prompt(self, i: int) -> str:
        """See ``Questions``."""
        return _decoded(self._tokenizer, self._data.prompts[i])

    @torch.inference_mode()
    def predict(self, lm: LanguageModel) -> list[Prediction]:
        """Softmax over the label words' mean log-likelihoods."""
        device = next(lm.model.parameters()).device
        words, found = list(self._data.class_names), []
        for part in torch.arange(len(self._data), dtype=torch.int64, device="cpu").split(_BATCH_SIZE):
            scores = candidate_scores(lm.model, self._data.batch(part.tolist(), answers="all", device=device))
            found += scores.double().softmax(-1).tolist()
        return [Choice(dict(zip(words, values, strict=True))) for values in found]


class OpenQuestions(Questions):
    """Prompts of free text. One that is too long loses its first tokens, as in training.

    Args:
        target: the model and its task.
        rows: the rows; their answers are not read.
        typed: see ``prompts.contents``.
        sampling: how tokens are drawn; None takes the most likely one.

    Raises:
        DataError: if a row does not fit the task, or its prompt has no tokens.
    """

    def __init__(self, target: Target, rows: LocatedRows, *, typed: bool, sampling: Sampling | None) -> None:
        task, config = target.config.task, target.config
        assert isinstance(task, TextTask)
        self._renderer, self._sampling, self._new = (
            renderer(config, target.lm),
            sampling,
            config.evaluation.max_new_tokens,
        )
        limit = _limit(target)
        self.cut, self._prompts = 0, []
        for content, where in zip(contents(task, rows, rows.places, typed=typed), rows.places, strict=True):
            ids = self._renderer.prompt(content, where)
            if not ids:
                raise DataError(f"{where}: its prompt has no tokens; give it some text")
            if limit is not None and len(ids) > limit:
                ids = _without_begin(ids, limit, self._renderer.tokenizer.bos_token_id)
                self.cut += 1
            self._prompts.append(ids)

    def prompt(self, i: int) -> str:
        """See ``Questions``."""
        return _decoded(self._renderer.tokenizer, self._prompts[i])

    def predict(self, lm: LanguageModel) -> list[Prediction]:
        """Generates an answer to each prompt."""
        answers = generate(
            lm.model,
            self._prompts,
            pad=lm.tokenizer.pad_token_id,
            end=self._renderer.end_tokens,
            max_new_tokens=self._new,
            sampling=self._sampling,
        )
        return [Answer(str(lm.tokenizer.decode(ids, skip_special_tokens=True)).strip()) for ids in answers]


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    begins_every_text = ids[:1] == tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.decode(ids[1:] if begins_every_text else ids))


def longest_prompt(target: Target) -> int | None:
    """Maximum number of tokens of a prompt by the model's positions, which hold the answer too; None: no limit."""
    positions = max_positions(target.lm.model)
    return None if positions is None else max(positions - target.config.evaluation.max_new_tokens, positions // 2)


def _limit(target: Target) -> int | None:
    """Maximum number of tokens of a prompt: of a run as in training, where prompt and answer have ``max_length``."""
    if target.replayed is None:
        return longest_prompt(target)
    length, positions = target.config.data.max_length, max_positions(target.lm.model)
    return (length if positions is None else min(length, positions)) - 1


def _without_begin(ids: list[int], limit: int, first: Any) -> list[int]:
    """The last tokens of a prompt, after the token that begins every text, if there is one."""
    kept = ids[:1] if ids[0] == first and limit > 1 else []
    return [*kept, *ids[len(ids) - limit + len(kept) :]]


def questions_of(
    target: Target, rows: LocatedRows, name: str, *, typed: bool = False, sampling: Sampling | None = None
) -> Questions:
    """Makes questions of rows.

    Args:
        target: the model and its task.
        rows: the rows, whose answers may be missing.
        name: name of the rows, for messages.
        typed: see ``prompts.contents``.
        sampling: how the tokens of free text are drawn; None takes the most likely one.

    Raises:
        DataError: see ``Choices`` and ``OpenQuestions``.
    """
    if isinstance(target.config.task, TextTask):
        return OpenQuestions(target, rows, typed=typed, sampling=sampling)
    return Choices(target, rows, name)


__all__ = ["Answer", "Choice", "OpenQuestions", "Prediction", "Questions", "longest_prompt", "questions_of"]
