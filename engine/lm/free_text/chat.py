"""Chat templates: the text of a conversation, and which characters of it are answers."""

import datetime
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from ...errors import ConfigError, DataError
from .shapes import Conversation, Message

# Some templates write today's date into the text. Examples must not depend on the day.
_DATE = datetime.datetime(2024, 7, 26)


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: the tokenizer.
        template: the template, in Jinja; None: the tokenizer's own.

    Raises:
        ConfigError: if there is no template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the data are conversations, and the model's tokenizer has no chat template; use a model that was "
                "trained for conversations, or give --chat-template FILE"
            )
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._template = _without_today(tokenizer.get_chat_template() if template is None else template)

    def text(self, messages: Sequence[Message], where: str, *, ask: bool = False) -> str:
        """The text of messages.

        Args:
            messages: the messages.
            where: where they stand, for messages of errors.
            ask: whether the text ends with the beginning of an assistant's message.

        Raises:
            DataError: if the template does not accept the messages.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=ask,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{where}: the chat template does not accept the conversation: {error}") from error

    def answers(self, conversation: Conversation, where: str) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where its answers stand in it.

        An answer is what the template writes for a message of the assistant, up to the token that ends the turn. It is
        what the template marks with ``{% generation %}``. Other templates' answers are found by comparing the texts of
        the first messages, each of which must be a prefix of the next.

        Args:
            conversation: the conversation.
            where: where it stands, for messages of errors.

        Returns:
            The text, and begin and end of each answer in characters.

        Raises:
            DataError: if the template does not accept the messages, or does not show where the answers are.
        """
        text = self.text(conversation.messages, where)
        numbers = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        spans = self._marked(conversation, numbers, where) if self._marks_answers else None
        answers = []
        for position, number in enumerate(numbers):
            content = conversation.messages[number]["content"].strip()
            if number < conversation.asked or not content:
                continue
            begin, end = self._compared(conversation, number, text, where) if spans is None else spans[position]
            answers.append((begin, begin + self._length(text[begin:end], content)))
        return text, answers

    def _compared(self, conversation: Conversation, number: int, whole: str, where: str) -> tuple[int, int]:
        """Begin and end of what the template adds for a message."""
        messages = conversation.messages
        before = self.text(messages[:number], where, ask=True)
        after = whole if number == len(messages) - 1 else self.text(messages[: number + 1], where)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"{where}, message {number + 1}: the chat template writes a message differently when others follow "
                f"it, so the answers cannot be told from the prompts; give a --chat-template FILE that marks them "
                f"with {{% generation %}}, or conversations with one answer each"
            )
        return len(before), len(after)

    @property
    def _marks_answers(self) -> bool:
        """Whether the template says itself what the assistant's text is."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None

    def _marked(self, conversation: Conversation, numbers: Sequence[int], where: str) -> list[tuple[int, int]]:
        """Begin and end of what the template marks, for each message of the assistant."""
        _, (spans,) = render_jinja_template(
            [[dict(message) for message in conversation.messages]],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        if len(spans) != len(numbers):
            raise DataError(
                f"{where}: the chat template marks {len(spans)} texts with {{% generation %}}, and the assistant has "
                f"{len(numbers)} messages; give another --chat-template FILE"
            )
        return [(int(begin), int(end)) for begin, end in spans]

    def _length(self, answer: str, content: str) -> int:
        """How long an answer is with the token that ends its turn, without what the template writes after that."""
        after_content = answer.rfind(content) + len(content) if content in answer else len(answer.rstrip())
        ends = [
            answer.find(token, after_content) + len(token) for token in self._special if token in answer[after_content:]
        ]
        if ends:
            return min(ends)
        stripped = answer.rstrip()
        return len(stripped if any(stripped.endswith(token) for token in self._special) else answer)


def special_tokens(tokenizer: Any) -> list[str]:
    """The tokens that are not text: those that the tokenizer names, and those that it only marks as special."""
    marked = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *marked]))


def _without_today(template: str) -> str:
    """A template that writes the same date every day. Raises ``ConfigError`` if it writes the date in another way."""
    fixed = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(_DATE.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", fixed):
        raise ConfigError(
            "the chat template writes today's date in a way that cannot be fixed; give --chat-template FILE"
        )
    return fixed


__all__ = ["ChatTemplate", "special_tokens"]
