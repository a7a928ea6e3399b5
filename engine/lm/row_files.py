"""Rows of the files that people keep their data in, each with the place that it comes from."""

from pathlib import Path
from typing import Any

from .json_rows import json_line_rows
from .text_lines import read_content


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a JSON Lines file in UTF-8. Blank lines and byte order marks are skipped.

    Raises:
        DataError: if the file cannot be read, or a line is not a JSON object; the message names the line.
    """
    return [row for _, row in json_line_rows(read_content(path), path)]


__all__ = ["read_jsonl"]
