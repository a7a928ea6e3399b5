"""Rows of tables: comma- and tab-separated values, and Parquet."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError
from .text_lines import decoded_lines

# What the csv module says for a carriage return between two values: it was written for programmers.
_BARE_RETURN = "new-line character seen in unquoted field"


def comma_separated_rows(content: bytes, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of comma-separated values, each with its place; see ``_separated_rows``."""
    return _separated_rows(content, path, ",")


def tab_separated_rows(content: bytes, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of tab-separated values, each with its place; see ``_separated_rows``."""
    return _separated_rows(content, path, "\t")


def parquet_rows(content: bytes, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a Parquet file, each with its place; nested values are lists and dicts.

    Args:
        content: the file's bytes.
        path: the file, for places and messages.

    Raises:
        DataError: if the file is damaged, or a name is there twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        _check_names(file.schema_arrow.names, str(path))
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield f"{path}, row {number}", row
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # KeyError: a map with a key twice
        reason = " ".join(str(error).split())  # some have several lines
        raise DataError(f"{path}: cannot be read as Parquet ({reason})") from error


def _separated_rows(content: bytes, path: Path, separator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of separated values, each with its place: the line where it begins.

    The first line names the fields. All values are text. Values with a separator, a quote or a line break in them are
    in double quotes, and a quote in one is doubled. Lines without a value are skipped.

    Args:
        content: the file's bytes.
        path: the file, for places and messages.
        separator: what separates two values.

    Raises:
        DataError: if a name is missing or there twice, a row has more or fewer values than there are names, or quotes
            do not match; the message names the line.
    """
    records = _records(content, path, separator)
    if not records:
        return
    line, names = records[0]
    if len(names) == 1 and any(mark in names[0] for mark in ";,\t"):
        raise DataError(
            f"{path}, line {line}: the header {names[0]!r} is one name, so the values are not separated as "
            f"the name of the file says: by commas in .csv files, by tabs in .tsv files"
        )
    _check_names(names, f"{path}, line {line}")
    for line, values in records[1:]:
        where = f"{path}, line {line}"
        if len(values) != len(names):
            raise DataError(
                f"{where}: the row has {len(values)} values, the header {len(names)} names; put double quotes around "
                f"a value with a separator or a line break in it"
            )
        yield where, dict(zip(names, values, strict=True))


def _records(content: bytes, path: Path, separator: str) -> list[tuple[int, list[str]]]:
    """The values of each row, the header's among them, and the line where the row begins."""
    lines = (line if number > 1 else line.removeprefix("\ufeff") for number, line in decoded_lines(content, path))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    records, begin = [], 1
    with _values_of_any_length():
        try:
            for values in reader:
                if values:
                    records.append((begin, values))
                begin = reader.line_num + 1
        except csv.Error as error:
            reason = str(error)
            if reason.startswith(_BARE_RETURN):
                reason = "a carriage return outside quotes"
            elif reason == "unexpected end of data":
                reason = "a quote is opened and never closed"
            raise DataError(f"{path}, line {begin}: the row cannot be read ({reason})") from error
    return records


@contextmanager
def _values_of_any_length() -> Iterator[None]:
    """Lifts the csv module's limit of 131,072 characters a value, which counts for the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_names(names: list[str], where: str) -> None:
    for column, name in enumerate(names, 1):
        if not name.strip():
            raise DataError(f"{where}: column {column} has no name; the header must name every field")
        if names.index(name) < column - 1:
            raise DataError(f"{where}: two columns are named {name!r}; rename or remove one")


__all__ = ["comma_separated_rows", "parquet_rows", "tab_separated_rows"]
