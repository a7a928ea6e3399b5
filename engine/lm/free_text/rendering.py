"""``Renderer``: prompts and answers as tokens, with the tokens of the answers marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from ...errors import ConfigError, DataError, ModelError
from .chat import ChatTemplate, special_tokens
from .shapes import Content, Conversation, Instruction, Plain

# For models without a chat template, or where the user wants text.
_WITH_INPUT = "Task: {instruction}\n\nMaterial: {input}\n\nResult:"
_WITHOUT_INPUT = "Task: {instruction}\n\nResult:"


class PromptFormat(StrEnum):
    """How prompts are presented to the model.

    ``AUTO``: instructions as a message of a chat if the tokenizer has a chat template, else as text; other prompts as
    they are. Conversations always need a chat template.
    ``CHAT``: instructions and plain prompts are a user's message, the answer is the assistant's.
    ``TEXT``: instructions and plain prompts are text.
    """

    AUTO = "auto"
    CHAT = "chat"
    TEXT = "text"


@dataclass(frozen=True)
class Rendered:
    """A text as tokens.

    Args:
        ids: token ids.
        spans: begin and end of each answer in ``ids``, ascending and disjoint; none if the answer has no token.
        merged: whether the first token of an answer begins in its prompt.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    merged: bool = False


class Renderer:
    """Makes tokens of prompts and answers.

    Args:
        tokenizer: the model's tokenizer; a fast one.
        chat_template: chat template that replaces the tokenizer's; None: the tokenizer's own.
        prompt_format: how prompts are presented.

    Raises:
        ConfigError: if the format is ``CHAT`` and there is no chat template.
        ModelError: if the tokenizer ends prompts with a special token, or reports no offsets.
    """

    def __init__(
        self, tokenizer: Any, chat_template: str | None = None, prompt_format: PromptFormat = PromptFormat.AUTO
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} does not say which characters a token stands for, so answers cannot be "
                f"marked; use the model's fast tokenizer"
            )
        if tokenizer("a")["input_ids"][-1:] != tokenizer("a", add_special_tokens=False)["input_ids"][-1:]:
            raise ModelError(
                "the tokenizer ends every prompt with a special token; turn this off (add_eos_token=False)"
            )
        self.tokenizer = tokenizer
        self._chat_template, self._format = chat_template, prompt_format
        self._has_chat = chat_template is not None or bool(getattr(tokenizer, "chat_template", None))
        if prompt_format is PromptFormat.CHAT and not self._has_chat:
            raise ConfigError(
                "prompt_format is chat, and the tokenizer has no chat template; give --chat-template FILE, or "
                "--prompt-format text"
            )

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self._chat_template)

    def presented(self, content: Content) -> Plain | Conversation:
        """The content as it is presented to the model: as text or as a conversation."""
        if isinstance(content, Conversation):
            return content
        chat = self._format is PromptFormat.CHAT
        if isinstance(content, Instruction):
            chat = chat or (self._format is PromptFormat.AUTO and self._has_chat)
            plain = _instruction(content, chat=chat)
        else:
            plain = content
        if not chat:
            return plain
        user = {"role": "user", "content": plain.prompt.strip()}
        return Conversation((user, {"role": "assistant", "content": plain.answer.strip()}))

    def render(self, contents: Sequence[Content], places: Sequence[str]) -> list[Rendered]:
        """Makes tokens.

        Args:
            contents: prompts and answers.
            places: where each stands, for messages.

        Raises:
            DataError: if a prompt has no token, or the chat template does not fit a conversation.
        """
        presented = [self.presented(content) for content in contents]
        plain = [i for i, content in enumerate(presented) if isinstance(content, Plain)]
        rendered = dict(zip(plain, self._plain([presented[i] for i in plain], places), strict=True))
        for i, content in enumerate(presented):
            if isinstance(content, Conversation):
                rendered[i] = self._conversation(content, places[i])
        for i, where in enumerate(places):
            if rendered[i].spans[:1] and rendered[i].spans[0][0] == 0:
                raise DataError(f"{where}: its prompt has no tokens; leave the row out")
        return [rendered[i] for i in range(len(contents))]

    def prompt(self, content: Content, where: str) -> list[int]:
        """Token ids of a prompt, up to where the model is to go on: its answers, if any, are not read.

        Args:
            content: prompt or conversation. A conversation ends with the message to answer.
            where: where it stands, for messages.
        """
        presented = self.presented(content)
        if isinstance(presented, Plain):
            (ids,) = self._texts([presented.prompt])
            if not presented.prompt.endswith(" "):
                return ids
            # in most tokenizers the last space belongs to the token of the answer's first word
            return ids[: _common_prefix(ids, self._texts([presented.prompt + "a"])[0])]
        messages = presented.messages[:-1] if presented.messages[-1]["role"] == "assistant" else presented.messages
        return self._ids(self._chat.text(messages, where, ask=True))

    @cached_property
    def end_tokens(self) -> list[int]:
        """Ids of the tokens that end an answer; empty if the tokenizer has none."""
        ids = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        if self._has_chat:  # the token that ends a turn may be another one
            probe = Conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
            try:
                rendered = self._conversation(probe, "a chat of two messages")
            except DataError:
                return ids
            last = rendered.ids[rendered.spans[-1][1] - 1]
            special = self.tokenizer.convert_tokens_to_ids(special_tokens(self.tokenizer))
            if last in special and last not in ids:
                ids.append(last)
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _texts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts. A token that begins every text is there once, also where the text has it already."""
        first = self.tokenizer.bos_token_id
        encoded: list[list[int]] = self.tokenizer(texts)["input_ids"]
        return [ids[1:] if first is not None and ids[:2] == [first, first] else ids for ids in encoded]

    def _plain(self, contents: Sequence[Any], places: Sequence[str]) -> list[Rendered]:
        """Prompts that answers follow directly, and the token that ends a text, if the tokenizer has one."""
        if not contents:
            return []
        prompts = self._texts([content.prompt for content in contents])
        texts = self._texts([content.prompt + content.answer for content in contents])
        end = self.tokenizer.eos_token_id
        rendered = []
        for prompt, ids in zip(prompts, texts, strict=True):
            begin = _common_prefix(prompt, ids)
            ends = [end] if end is not None and ids[-1:] != [end] else []
            spans = [(begin, len(ids) + len(ends))] if begin < len(ids) else []
            rendered.append(Rendered([*ids, *ends], spans, merged=begin < len(prompt)))
        return rendered

    def _conversation(self, conversation: Conversation, where: str) -> Rendered:
        text, answers = self._chat.answers(conversation, where)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        spans, merged = [], False
        for begin, end in answers:
            inside = [i for i, (first, last) in enumerate(offsets) if last > begin and first < end]
            if inside:
                merged |= offsets[inside[0]][0] < begin
                spans.append((inside[0], inside[-1] + 1))
        return Rendered(list(encoded["input_ids"]), spans, merged)


def _instruction(content: Instruction, *, chat: bool) -> Plain:
    """An instruction as text; in a chat, only a blank line stands between instruction and input."""
    instruction, material = content.instruction.strip(), content.input.strip()
    if chat:
        return Plain("\n\n".join(filter(None, (instruction, material))), content.answer)
    template = _WITH_INPUT if material else _WITHOUT_INPUT
    return Plain(template.format(instruction=instruction, input=material), " " + content.answer.strip())


def _common_prefix(prompt: Sequence[int], text: Sequence[int]) -> int:
    """Number of first tokens that are the same."""
    for i, (own, other) in enumerate(zip(prompt, text, strict=False)):
        if own != other:
            return i
    return min(len(prompt), len(text))


__all__ = ["PromptFormat", "Rendered", "Renderer"]
