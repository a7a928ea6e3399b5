"""Rows without answers: what the user types or keeps in a file, as rows of the target's task."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from ...engine.errors import ConfigError, DataError
from ...engine.lm.data import AnyTask
from ...engine.lm.free_text.rendering import PromptFormat
from ...engine.lm.free_text.shapes import Content, Shape
from ...engine.lm.free_text.task import Row, TextTask
from ...engine.lm.tasks import Task
from ...engine.lm.template import template_fields
from ...engine.lm.text import check_text
from ..setup.data import read_rows
from .target import Target

# Stands for an answer that is not there, where rows are checked like those of training. No prompt contains it.
_ANSWER = "?"
# Answers in the rows of the built-in tasks' data sets, before these are prepared.
_ANSWERS_ON_HUB: Row = {"answers": {"text": [_ANSWER]}, "answers_spans": {"spans": [_ANSWER]}, "response": _ANSWER}
# Fields of a prompt by shape; the text of --text is the first one.
_PROMPT_FIELDS = {Shape.PROMPT_COMPLETION: ("prompt",), Shape.INSTRUCTION_OUTPUT: ("instruction", "input")}
# The only field of a conversation.
CHAT: Sequence[str] = ("messages",)


def typed_row(target: Target, text: str | None, fields: Mapping[str, str]) -> Row:
    """The row that the user typed.

    Args:
        target: the model and its task.
        text: value of ``--text``.
        fields: values of ``--field`` by name.

    Raises:
        ConfigError: if the values are not those of the prompt's fields.
        DataError: if the text is empty, or what it is depends on examples that cannot be read.
    """
    for name, value in (("--text", text), *((f"--field {name}", value) for name, value in fields.items())):
        if value is not None:
            check_text(value, name)
    if text is not None and not text.strip():
        raise DataError("--text is empty; give it some text")
    if text is None and not any(value.strip() for value in fields.values()):
        raise DataError("every --field is empty; give some text")
    names, optional = prompt_fields(target, fields)
    if names == CHAT and fields:
        raise ConfigError(
            "the examples are conversations, which have no other fields; give the user's message with --text, or "
            "conversations with --data FILE"
        )
    unknown = [name for name in fields if name not in names]
    if unknown:
        raise ConfigError(f"there is no field {unknown[0]!r} in the prompt; its fields are {', '.join(names)}")
    given = dict(fields)
    if text is not None:
        required = [name for name in names if name not in optional and name not in fields]
        if len(required) != 1:
            raise ConfigError(_not_one_field(target, names, required))
        if names == CHAT:
            return {"messages": [{"role": "user", "content": text}]}
        given[required[0]] = text
    missing = [name for name in names if name not in optional and name not in given]
    if missing:
        raise ConfigError(f"the prompt needs the field {missing[0]!r} too; give --field {missing[0]}=VALUE")
    return given


def _not_one_field(target: Target, names: Sequence[str], required: Sequence[str]) -> str:
    if not required:
        return "--text is for the field that no --field gives, and all are given; leave it out"
    return (
        f"the prompt of {target.config.task.name!r} has the fields {', '.join(names)}, and --text can be only one of "
        f"them; give --field NAME=VALUE for the others, or rows with --data FILE"
    )


def prompt_fields(target: Target, fields: Container[str] = ()) -> tuple[Sequence[str], Sequence[str]]:
    """Names of the prompt's fields, and of those that may be missing. The only field of a conversation is ``messages``.

    Args:
        target: the model and its task.
        fields: names of fields that the user gave, from which follows what shape the prompt has if the task has none.

    Raises:
        DataError: see ``shape_of``.
    """
    task = target.config.task
    if isinstance(task, Task):
        return task.fields, ()
    if task.template is not None:
        return template_fields(task.template), ()
    shape = next((shape for shape, names in _PROMPT_FIELDS.items() if names[0] in fields), None) or shape_of(target)
    names = _PROMPT_FIELDS.get(shape)
    return (names, names[1:]) if names is not None else (CHAT, ())


def shape_of(target: Target) -> Shape:
    """The shape of a task of free text without a template.

    Raises:
        DataError: if that is in the run's examples, and these cannot be read.
    """
    if not target.has_task:
        as_text = target.config.data.prompt_format is PromptFormat.TEXT
        return Shape.MESSAGES if has_chat_template(target) and not as_text else Shape.PROMPT_COMPLETION
    if not target.config.data.is_own:  # the built-in tasks without a template
        return Shape.INSTRUCTION_OUTPUT
    try:
        task, rows, _ = read_rows(target.config)
        shape = None if not isinstance(task, TextTask) else task.shape(task.row(rows[0], rows.places[0]), "row 1")
    except DataError as error:
        raise DataError(
            f"what --text is depends on the examples of {target.name}, and they cannot be read ({error}); give "
            f"--field prompt=TEXT or --field instruction=TEXT, or rows with --data FILE"
        ) from error
    assert shape is not None
    return shape


def has_chat_template(target: Target) -> bool:
    """Whether there is a chat template, the tokenizer's or the user's."""
    return target.config.data.chat_template is not None or bool(getattr(target.lm.tokenizer, "chat_template", None))


def with_answer(task: AnyTask, row: Row) -> Row:
    """The row with an answer in place of its own, which may be missing."""
    if isinstance(task, Task):
        return row if task.label in task.fields else {**row, task.label: task.label_words[0].strip()}
    if task.template is not None and task.answer is not None:
        only_answer = set(template_fields(task.answer)) - set(template_fields(task.template))
        return {**row, **dict.fromkeys(only_answer, _ANSWER)}
    changed = dict(row)
    if isinstance(row.get("messages"), Sequence):
        changed["messages"] = _answered(row["messages"], "role", "assistant", "content")
    if isinstance(row.get("conversations"), Sequence):
        changed["conversations"] = _answered(row["conversations"], "from", "gpt", "value")
    of_instruction = row.get("instruction") is not None and "completion" not in row
    if row.get("prompt") is not None and not of_instruction:
        as_chat = isinstance(row["prompt"], list)
        changed["completion"] = [{"role": "assistant", "content": _ANSWER}] if as_chat else _ANSWER
    elif of_instruction:
        changed["output"] = _ANSWER
    return changed


def _answered(messages: Sequence[Any], role: str, assistant: str, content: str) -> list[Any]:
    """Messages that end with an answer: in place of the last one, if that is the assistant's."""
    last = messages[-1] if messages else None
    of_assistant = isinstance(last, Mapping) and last.get(role) in ("assistant", assistant)
    return [*messages[: -1 if of_assistant else None], {role: assistant, content: _ANSWER}]


def contents(task: TextTask, rows: Sequence[Row], places: Sequence[str], *, typed: bool) -> list[Content]:
    """What rows of free text say, with answers that have no meaning.

    Args:
        task: the task.
        rows: the rows; their answers may be missing.
        places: where each row stands, for messages.
        typed: whether the rows have the fields of the prompt, and not those of the task's data set.

    Raises:
        DataError: if a row does not fit the task.
    """
    of_rows, shape = [], None
    for row, where in zip(rows, places, strict=True):
        prepared = row if typed or task.prepare is None else task.row({**_ANSWERS_ON_HUB, **row}, where)
        answered = with_answer(task, prepared)
        shape = task.shape(answered, where) if shape is None else shape
        of_rows.append(task.content(answered, shape, where))
    return of_rows


__all__ = ["CHAT", "contents", "has_chat_template", "prompt_fields", "shape_of", "typed_row", "with_answer"]
