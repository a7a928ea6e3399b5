"""``Dialogue``: the prompts of a conversation in a terminal, and its answers as they are generated."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ...engine import stream
from ...engine.errors import ConfigError, DataError
from ...engine.lm.free_text.rendering import PromptFormat, Renderer
from ...engine.lm.free_text.shapes import Conversation, Message
from ...engine.lm.free_text.task import TextTask
from ...engine.lm.generation import Sampling, generate
from ...engine.lm.models import LanguageModel
from ...engine.lm.text import check_text
from ..setup.data import renderer
from .prompts import CHAT, contents, has_chat_template, prompt_fields, typed_row
from .questions import longest_prompt
from .target import Target

Write = Callable[[str], None]


class Dialogue(ABC):
    """Asks a model line by line.

    Args:
        target: the model and its task.
        sampling: how tokens are drawn; None takes the most likely one.
    """

    def __init__(self, target: Target, sampling: Sampling | None) -> None:
        self._target, self._sampling, self._asked = target, sampling, 0
        self._renderer: Renderer = renderer(target.config, target.lm)
        self._limit = longest_prompt(target)

    def answer(self, line: str, lm: LanguageModel, write: Write, note: Write) -> None:
        """Answers a line. Ctrl-C ends the answer early.

        Args:
            line: what the user says.
            lm: the model, with the weights that it has now.
            write: called with the parts of the answer as they come.
            note: called with lines about the conversation.

        Raises:
            DataError: if the line cannot be a prompt. It is forgotten.
        """
        check_text(line, "the line")
        ids = self._prompt(line, note)
        if not ids:
            raise DataError("the line has no tokens; say something else")
        shown = _Shown(lm.tokenizer, write)
        self._asked += 1
        with suppress(KeyboardInterrupt):
            generate(
                lm.model,
                [ids],
                pad=lm.tokenizer.pad_token_id,
                end=self._renderer.end_tokens,
                max_new_tokens=self._target.config.evaluation.max_new_tokens,
                sampling=self._sampling_now(),
                on_token=shown.add,
            )
        self._keep(line, shown.end())

    def _sampling_now(self) -> Sampling | None:
        """Draws that differ from answer to answer."""
        if self._sampling is None:
            return None
        return dataclasses.replace(self._sampling, seed=stream.derived_seed(self._sampling.seed, "turn", self._asked))

    def _too_long(self, ids: list[int]) -> bool:
        return self._limit is not None and len(ids) > self._limit

    def _error_if_too_long(self, ids: list[int]) -> list[int]:
        if self._too_long(ids):
            raise DataError(
                f"the line is too long: its prompt has {len(ids)} tokens, and {self._limit} fit; shorten it"
            )
        return ids

    @abstractmethod
    def _prompt(self, line: str, note: Write) -> list[int]:
        """Token ids of the prompt that a line makes."""

    @abstractmethod
    def _keep(self, line: str, answer: str) -> None:
        """Receives each answer."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets what has been said."""


class Turns(Dialogue):
    """A conversation: a prompt has all turns before it, as far as they fit.

    Args:
        target: the model and its task.
        sampling: how tokens are drawn; None takes the most likely one.
        system: the system message; None: no such message.
    """

    def __init__(self, target: Target, sampling: Sampling | None, system: str | None) -> None:
        super().__init__(target, sampling)
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[list[Message]] = []
        self._has_said = False

    def _prompt(self, line: str, note: Write) -> list[int]:
        asked = {"role": "user", "content": line}
        first = 0
        ids = self._ids([*self._turns, [asked]])
        while self._too_long(ids) and first < len(self._turns):
            first += 1
            ids = self._ids([*self._turns[first:], [asked]])
        self._error_if_too_long(ids)
        if first and not self._has_said:
            note("the conversation is too long for the model: from now on it forgets the first turns")
            self._has_said = True
        del self._turns[:first]
        return ids

    def _ids(self, turns: list[list[Message]]) -> list[int]:
        messages = (message for turn in turns for message in turn)
        return self._renderer.prompt(Conversation((*self._system, *messages)), "the conversation")

    def _keep(self, line: str, answer: str) -> None:
        if answer:
            self._turns.append([{"role": "user", "content": line}, {"role": "assistant", "content": answer}])

    def reset(self) -> None:
        """Forgets what has been said."""
        self._turns.clear()


class Lines(Dialogue):
    """Each line is a prompt of its own, as in the training of a run on prompts that are text.

    Args:
        target: the model and its task.
        sampling: how tokens are drawn; None takes the most likely one.
        field: name of the prompt's field that the line is.
    """

    def __init__(self, target: Target, sampling: Sampling | None, field: str) -> None:
        super().__init__(target, sampling)
        self._field = field

    def _prompt(self, line: str, note: Write) -> list[int]:
        task = self._target.config.task
        assert isinstance(task, TextTask)
        row = typed_row(self._target, None, {self._field: line})
        (content,) = contents(task, [row], ["the line"], typed=True)
        return self._error_if_too_long(self._renderer.prompt(content, "the line"))

    def _keep(self, line: str, answer: str) -> None:
        pass

    def reset(self) -> None:
        """Forgets nothing: no line depends on those before it."""


class _Shown:
    """Text of tokens, written as far as it is certain: a character may need several tokens."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._written = 0

    def add(self, token: int) -> None:
        """Receives the next token."""
        self._ids.append(token)
        text = self._text()
        if not text.endswith("\ufffd"):
            self._write(text[self._written :])
            self._written = len(text)

    def end(self) -> str:
        """Writes what is left. Returns the whole text, without surrounding white space."""
        text = self._text()
        self._write(text[self._written :])
        return text.strip()

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()


def dialogue_of(target: Target, sampling: Sampling | None, system: str | None) -> tuple[Dialogue, str]:
    """The dialogue that fits a target, and what it is in words.

    Raises:
        ConfigError: if the target chooses between label words, its prompt has several fields, or there is no chat
            template and one is needed.
    """
    task, name = target.config.task, target.name
    if not isinstance(task, TextTask):
        raise ConfigError(f"{name} chooses between label words and does not talk; use `meerkat-engine predict`")
    as_text = target.config.data.prompt_format is PromptFormat.TEXT
    if not (target.has_task or has_chat_template(target) or as_text):
        raise ConfigError(
            f"the tokenizer of {name} has no chat template; give --chat-template FILE, or --prompt-format text, with "
            f"which each line is a prompt of its own"
        )
    fields, optional = prompt_fields(target)
    if len(fields) - len(optional) > 1:
        raise ConfigError(
            f"the prompt of {task.name!r} has the fields {', '.join(fields)}, and a line can be only one of them; use "
            f"`meerkat-engine predict` with --field"
        )
    if fields == CHAT or _is_presented_as_chat(target, task, fields[0]):
        return Turns(target, sampling, system), "a conversation in the chat template"
    if system is not None:
        raise ConfigError("--system is for conversations, and here each line is a prompt of its own; leave it out")
    option = "--prompt-format chat" if has_chat_template(target) else "--chat-template FILE"
    return (
        Lines(target, sampling, fields[0]),
        f"each line is a prompt of its own (for a conversation, give {option})",
    )


def _is_presented_as_chat(target: Target, task: TextTask, field: str) -> bool:
    row = typed_row(target, None, {field: "a"})
    (content,) = contents(task, [row], ["the line"], typed=True)
    return isinstance(renderer(target.config, target.lm).presented(content), Conversation)


__all__ = ["Dialogue", "dialogue_of"]
