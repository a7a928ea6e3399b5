"""Rows of the files that people keep their data in, each with the place that it comes from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .json_rows import json_line_rows, json_rows
from .table_rows import comma_separated_rows, parquet_rows, tab_separated_rows
from .text_lines import read_content

# By the end of the file's name. Each takes a file's bytes and its path.
_READERS = {
    ".jsonl": json_line_rows,
    ".ndjson": json_line_rows,
    ".json": json_rows,
    ".csv": comma_separated_rows,
    ".tsv": tab_separated_rows,
    ".parquet": parquet_rows,
}
FORMATS = ".jsonl and .ndjson (JSON Lines), .json, .csv, .tsv, .parquet"


@dataclass(frozen=True)
class LocatedRows(Sequence[dict[str, Any]]):
    """Rows and where they stand.

    Args:
        rows: the rows: values by name of the field.
        places: where each row stands, for messages: "FILE, line 7"; in formats without lines "FILE, row 7".
    """

    rows: list[dict[str, Any]]
    places: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return self.rows[i]

    def select(self, indices: Sequence[int]) -> "LocatedRows":
        """The rows at the given indices, in this order."""
        return LocatedRows([self.rows[i] for i in indices], [self.places[i] for i in indices])


def read_rows(path: Path) -> LocatedRows:
    """Reads the rows of a file, in the format that its name ends with (``FORMATS``).

    Values of .csv and .tsv files are text; those of the other formats have the types that the file gives them. A file
    with another name is read as JSON Lines. Text is UTF-8, with or without a byte order mark, and comes as it is:
    characters like U+2028 end no line.

    Raises:
        DataError: if the file cannot be read, has no rows, or is not of the format that its name says; the message
            names the line or row.
    """
    read = _READERS.get(path.suffix.lower(), _unnamed_rows)
    located = list(read(read_content(path), path))
    if not located:
        raise DataError(f"{path} has no examples")
    return LocatedRows(rows=[row for _, row in located], places=[place for place, _ in located])


def is_plain_text(path: Path) -> bool:
    """Whether a file is no table of rows: its name ends with no format's, and it does not begin with a JSON object."""
    if path.suffix.lower() in _READERS:
        return False
    return _begin(read_content(path)) != b"{"


def _unnamed_rows(content: bytes, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file whose name does not say its format: JSON Lines, if it begins like them."""
    if _begin(content) not in (b"", b"{"):
        raise DataError(
            f"{path}: a file with this name is read as JSON Lines, but does not begin with an object; name it after "
            f"its format: {FORMATS}"
        )
    return json_line_rows(content, path)


def _begin(content: bytes) -> bytes:
    """The first byte after a byte order mark and white space; empty if there is none."""
    return content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


__all__ = ["FORMATS", "LocatedRows", "is_plain_text", "read_rows"]
