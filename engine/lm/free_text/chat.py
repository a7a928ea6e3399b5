"""Chat templates: the text of a conversation, and which characters of it are answers."""

import datetime
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

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

        An answer is what the template adds for a message of the assistant, up to the token that ends the turn. It is
        found by comparing the texts of the first messages, each of which must be a prefix of the next.

        Args:
            conversation: the conversation.
            where: where it stands, for messages of errors.

        Returns:
            The text, and begin and end of each answer in characters.

        Raises:
            DataError: if the texts of the first messages are no prefixes of the whole text.
        """
        messages = conversation.messages
        whole = self.text(messages, where)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number < conversation.asked or not message["content"].strip():
                continue
            before = self.text(messages[:number], where, ask=True)
            after = whole if number == len(messages) - 1 else self.text(messages[: number + 1], where)
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"{where}, message {number + 1}: the chat template writes a message differently when others follow "
                    f"it, so the answers cannot be told from the prompts; give a --chat-template FILE that marks them "
                    f"with {{% generation %}}, or conversations with one answer each"
                )
            spans.append((len(before), self._end_of_turn(after, len(before))))
        return whole, spans

    @property
    def marks_answers(self) -> bool:
        """Whether the template says itself what the assistant's text is, with ``{% generation %}``."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None

    def marked(self, conversation: Conversation, where: str) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and for each 1 if the template marks it as the assistant's, else 0.

        Raises:
            DataError: if the template does not accept the messages.
        """
        self.text(conversation.messages, where)  # for its errors
        encoded = self._tokenizer.apply_chat_template(
            [dict(message) for message in conversation.messages],
            chat_template=self._template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])

    def _end_of_turn(self, text: str, begin: int) -> int:
        """Where an answer ends: after its end-of-turn token, without the white space that follows that."""
        stripped = text.rstrip()
        ends_turn = any(stripped.endswith(token) for token in self._tokenizer.all_special_tokens)
        return max(len(stripped), begin) if ends_turn else len(text)


def _without_today(template: str) -> str:
    """A template that writes the same date every day. Raises ``ConfigError`` if it writes the date in another way."""
    fixed = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(_DATE.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", fixed):
        raise ConfigError(
            "the chat template writes today's date in a way that cannot be fixed; give --chat-template FILE"
        )
    return fixed


__all__ = ["ChatTemplate"]
