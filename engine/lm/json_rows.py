"""Rows in JSON: one object a line (JSON Lines), or all of them in one array."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .text_lines import decoded_lines

_MARK = "\ufeff"  # byte order mark


def json_line_rows(content: bytes, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of JSON Lines, each with its place. Blank lines and byte order marks are skipped.

    ``NaN``, ``Infinity`` and ``-Infinity``, which Python's and other writers write, are read as floats.

    Args:
        content: the file's bytes.
        path: the file, for places and messages.

    Raises:
        DataError: if a line is not a JSON object in UTF-8, or names a field twice; the message names the line.
    """
    for number, line in decoded_lines(content, path):
        text = line.removeprefix(_MARK).strip()
        if text:
            where = f"{path}, line {number}"
            yield where, _object(_parsed(text, where), where)


def json_rows(content: bytes, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a ``.json`` file, each with its place.

    The file holds an array of objects; an object with exactly one list of objects in it, as in ``{"data": [...]}``;
    or JSON Lines. A list of messages, which have a role, is a part of a row: an object that holds it is one line of
    JSON Lines.

    Args:
        content: the file's bytes.
        path: the file, for places and messages.

    Raises:
        DataError: if the file is none of these, or an object names a field twice; the message says where.
    """
    text = "".join(line for _, line in decoded_lines(content, path)).removeprefix(_MARK)
    if not text.strip():
        return
    try:
        value = _parsed(text, str(path))
    except _MoreFollowsError:
        yield from json_line_rows(content, path)
        return
    for number, row in enumerate(_listed(value, path), 1):
        where = f"{path}, row {number}"
        yield where, _object(row, where)


class _MoreFollowsError(DataError):
    """A complete value is followed by more text."""


def _parsed(text: str, where: str) -> Any:
    """The value of a JSON text; raises ``DataError``, which is ``_MoreFollowsError`` if more text follows it."""
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:  # ValueError: also for integers with thousands of digits
        more = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        raise (_MoreFollowsError if more else DataError)(f"{where}: cannot be read as JSON ({error})") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these fields; raises ``ValueError`` if a name is there twice, one of which would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the field {repeated!r} twice")
    return fields


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, got {type(value).__name__}")
    return value


def _listed(value: Any, path: Path) -> Iterable[Any]:
    """The list of rows in a file's only value."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected an array of objects, got {type(value).__name__}")
    lists = [name for name, field in value.items() if _is_table(field)]
    if len(lists) > 1:
        raise DataError(f"{path} has several lists of objects, {sorted(lists)}; save each in a file of its own")
    return value[lists[0]] if lists else [value]


def _is_table(value: Any) -> bool:
    """Whether a value is a list of objects that are rows, and not the messages of a conversation."""
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        return False
    return not all("role" in each or "from" in each for each in value)


__all__ = ["json_line_rows", "json_rows"]
