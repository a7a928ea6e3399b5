"""``TextTask``: a task whose examples are prompts and answers, and the built-in tasks of free text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError, DataError
from ..hub import HubSource
from ..template import fill, template_fields
from ..text import check_text
from .shapes import Content, EmptyAnswerError, Plain, Shape, content_of, shape_of, text_field

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """A task of free text.

    Args:
        name: value of ``--task``, or the name of the user's data.
        hub: the task's data set on the Hugging Face hub; None if it is not there.
        template: the prompt, with field names in braces; None if rows have one of the shapes in ``shapes``.
        answer: the answer, with field names in braces, exactly as it follows the prompt; None without a template.
        references: name of the field with the list of acceptable answers, for metrics; None: the answer alone.
        client_field: name of the field that names the client an example belongs to, for the partition "natural".
        class_field: name of the field with an example's class, for the partitions that deal by class.
        prepare: makes a row with the fields above from a row of the data set.
        domains: see ``tasks.Task``.

    Raises:
        ConfigError: if a template is malformed, or only one of the two is given.
    """

    name: str
    hub: HubSource | None = None
    template: str | None = None
    answer: str | None = None
    references: str | None = None
    client_field: str | None = None
    class_field: str | None = None
    prepare: Callable[[Row], Row] | None = None
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.template is None) != (self.answer is None):
            raise ConfigError("template and answer go together: the prompt, and the answer that follows it")
        if self.template is not None and self.answer is not None:
            for text, name in ((self.template, "template"), (self.answer, "answer")):
                try:
                    check_text(text, f"the {name}")
                except DataError as error:
                    raise ConfigError(str(error)) from None
                template_fields(text)

    def row(self, row: Row, where: str) -> Row:
        """The row with the fields that the task names.

        Raises:
            DataError: if the row of the data set lacks a field.
        """
        if self.prepare is None:
            return row
        try:
            return self.prepare(row)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where}: the row has not the fields of {self.name!r} ({type(error).__name__}: {error}); found "
                f"{', '.join(sorted(row))}"
            ) from error

    def shape(self, row: Row, where: str) -> Shape | None:
        """The shape of a prepared row; None with a template. Raises ``DataError``; see ``shapes.shape_of``."""
        return None if self.template is not None else shape_of(row, where)

    def content(self, row: Row, shape: Shape | None, where: str) -> Content:
        """What a prepared row says.

        Args:
            row: see ``row``.
            shape: the shape of the data set's rows; see ``shape``.
            where: where the row stands, for messages.

        Raises:
            EmptyAnswerError: if the row has no answer, or an empty one.
            DataError: if the row has another shape or lacks a field of a template, or a value has another type.
        """
        if shape is not None:
            return content_of(row, shape, where)
        assert self.template is not None
        assert self.answer is not None
        if any(field in row and row[field] is None for field in template_fields(self.answer)):
            raise EmptyAnswerError(f"{where}: the answer is null")
        answer = _filled(self.answer, row, where)
        if not answer.strip():
            raise EmptyAnswerError(f"{where}: the answer is empty")
        return Plain(_filled(self.template, row, where), answer)

    def acceptable(self, row: Row, where: str) -> list[str] | None:
        """The acceptable answers of a prepared row, at least one; None if its own answer is the only one."""
        if self.references is None:
            return None
        texts = row.get(self.references)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: field {self.references!r} must be a list of texts, got {texts!r:.80}")
        return list(dict.fromkeys(texts))


def _filled(template: str, row: Row, where: str) -> str:
    fields = template_fields(template)
    for field in fields:
        if field not in row:
            raise DataError(
                f"{where}: {template!r} needs the field {field!r}; found {', '.join(sorted(row)) or 'no fields'}"
            )
    return fill(template, {field: text_field(row, field, where) for field in fields})


def text_task(name: str, template: str | None, answer: str | None, **options: Any) -> TextTask:
    r"""Creates a task for the user's own data.

    One space stands between template and answer, unless the template ends with white space or the answer begins with
    it. Spaces at the end of the template are moved to the answer, because tokens begin with the space before a word.

    Args:
        name: the task's name.
        template: the prompt, with field names in braces; None if the rows have a shape of their own.
        answer: the answer, with field names in braces.
        options: further fields of ``TextTask``.

    Raises:
        ConfigError: see ``TextTask``.

    Example:
        >>> text_task("faq", "Question: {q}\nAnswer: ", "{a}").answer
        ' {a}'
    """
    if template is not None and answer is not None:
        trimmed = template.rstrip(" ")
        spaces = template[len(trimmed) :]
        if not trimmed[-1:].isspace() and not answer[:1].isspace():
            spaces = spaces or " "
        template, answer = trimmed, spaces + answer
    return TextTask(name=name, template=template, answer=answer, **options)


__all__ = ["Row", "TextTask", "text_task"]
