"""The shapes in which people keep prompts and answers, and what a row of each shape says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ...errors import DataError
from ..text import check_text

Message = Mapping[str, Any]
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Names of roles in conversations of `from` and `value`.
_ROLE_OF = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class EmptyAnswerError(DataError):
    """A row has no answer, so there is nothing to learn from it."""


@dataclass(frozen=True)
class Plain:
    """A prompt, and the answer that follows it directly."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Instruction:
    """An instruction, perhaps with an input that it is about, and the answer."""

    instruction: str
    input: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Messages with a role and content, at least one of which is an assistant's.

    Args:
        messages: the messages.
        asked: number of first messages that are the prompt: answers are learned from the others only.
    """

    messages: tuple[Message, ...]
    asked: int = 0


Content = Plain | Instruction | Conversation


class Shape(StrEnum):
    """Fields that a row of free text has; the values are shown to the user."""

    MESSAGES = "messages"
    CONVERSATIONS = "conversations (from, value)"
    PROMPT_COMPLETION = "prompt and completion"
    INSTRUCTION_OUTPUT = "instruction, input and output"


_FIELDS = {
    Shape.MESSAGES: ("messages",),
    Shape.CONVERSATIONS: ("conversations",),
    Shape.PROMPT_COMPLETION: ("prompt", "completion"),
    Shape.INSTRUCTION_OUTPUT: ("instruction", "output"),
}


def shape_of(row: Mapping[str, Any], where: str) -> Shape:
    """Finds the shape of a row by its fields.

    Raises:
        DataError: if its fields are those of no shape, or of several.
    """
    shapes = [shape for shape, fields in _FIELDS.items() if all(field in row for field in fields)]
    if len(shapes) > 1:  # tables have all columns in every row
        shapes = [shape for shape in shapes if any(row[field] is not None for field in _FIELDS[shape])] or shapes
    if len(shapes) == 1:
        return shapes[0]
    known = "; ".join(", ".join(fields) for fields in _FIELDS.values())
    if shapes:
        raise DataError(f"{where}: the row has the fields of two shapes ({', '.join(shapes)}); keep one of them")
    raise DataError(
        f"{where}: expected the fields {known}; found {', '.join(sorted(row)) or 'none'}; name other fields with "
        f"--template and --answer, or give --labels for a choice between label words"
    )


def content_of(row: Mapping[str, Any], shape: Shape, where: str) -> Content:
    """What a row says.

    Args:
        row: the row.
        shape: the shape that it must have.
        where: where the row stands, for messages.

    Raises:
        EmptyAnswerError: if the row has no answer, or an empty one.
        DataError: if the row has another shape, a value of another type, or roles out of order.
    """
    missing = [field for field in _FIELDS[shape] if field not in row]
    if missing:
        raise DataError(
            f"{where}: the field {missing[0]!r} is missing; the rows before have {shape}, and all rows of a data set "
            f"must have the same shape; found {', '.join(sorted(row)) or 'no fields'}"
        )
    if row[_FIELDS[shape][-1]] is None:
        raise EmptyAnswerError(f"{where}: the answer is null")
    if shape is Shape.MESSAGES:
        return _conversation(row["messages"], where)
    if shape is Shape.CONVERSATIONS:
        return _conversation(_renamed(row["conversations"], where), where)
    if shape is Shape.INSTRUCTION_OUTPUT:
        given = "" if row.get("input") is None else text_field(row, "input", where)
        answer = text_field(row, "output", where)
        return Instruction(text_field(row, "instruction", where), given, _not_empty(answer, where))
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _conversation([*row["prompt"], *row["completion"]], where, asked=len(row["prompt"]))
    return Plain(text_field(row, "prompt", where), _not_empty(text_field(row, "completion", where), where))


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that holds text; raises ``DataError`` if it holds something else."""
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} must be text, got {type(value).__name__}")
    check_text(value, f"{where}: field {name!r}")
    return value


def _not_empty(answer: str, where: str) -> str:
    if not answer.strip():
        raise EmptyAnswerError(f"{where}: the answer is empty")
    return answer


def _renamed(turns: Any, where: str) -> list[Message]:
    """Messages with role and content from turns with ``from`` and ``value``."""
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise DataError(f"{where}: conversations must be a list, got {type(turns).__name__}")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or turn.get("from") not in _ROLE_OF or "value" not in turn:
            raise DataError(
                f"{where}, turn {number}: expected from (one of {', '.join(_ROLE_OF)}) and value; got {turn!r:.80}"
            )
        messages.append({"role": _ROLE_OF[turn["from"]], "content": turn["value"]})
    return messages


def _conversation(messages: Any, where: str, asked: int = 0) -> Conversation:
    """Checks the messages of a conversation; raises ``DataError``."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"{where}: messages must be a list, got {type(messages).__name__}")
    before = ""
    for number, message in enumerate(messages, 1):
        at = f"{where}, message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"{at}: expected an object with role and content, got {message!r:.80}")
        role = message["role"]
        if role not in _ROLES:
            raise DataError(f"{at}: unknown role {role!r}; known: {', '.join(_ROLES)}")
        text_field(message, "content", at)
        _check_order(role, before, number, at)
        before = role
    learned = [m for m in messages[asked:] if m["role"] == "assistant" and m["content"].strip()]
    if not learned:
        raise EmptyAnswerError(f"{where}: no message of the assistant has text")
    return Conversation(tuple(messages), asked)


def _check_order(role: str, before: str, number: int, at: str) -> None:
    if role in ("system", "developer"):
        wrong = number > 1
    elif role == "user":
        wrong = before in ("user", "tool")
    else:  # an assistant answers a user or a tool, a tool an assistant or, after several calls, another tool
        wrong = before not in (("user", "tool") if role == "assistant" else ("assistant", "tool"))
    if wrong:
        raise DataError(
            f"{at}: roles are out of order: {role} {f'follows {before}' if before else 'begins the conversation'}; a "
            f"system message comes first, then user and assistant take turns"
        )


__all__ = [
    "Content",
    "Conversation",
    "EmptyAnswerError",
    "Instruction",
    "Message",
    "Plain",
    "Shape",
    "content_of",
    "shape_of",
    "text_field",
]
