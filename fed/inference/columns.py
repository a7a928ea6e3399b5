"""Texts beside each other in a terminal."""

import shutil
import unicodedata
from collections.abc import Mapping, Sequence

_MARGIN = "  "
_WIDEST = 120


def terminal_width() -> int:
    """Number of columns to write: those of the terminal, at most 120; 80 where there is none."""
    return min(shutil.get_terminal_size((80, 24)).columns, _WIDEST)


def printable(text: str) -> str:
    """A text without characters that would control the terminal: they are written as escapes. Line ends stay."""
    return "".join(c if c in "\n" or c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return "    " if character == "\t" else character.encode("unicode_escape").decode()


def cells(text: str) -> int:
    """Number of columns that a line takes: two for wide characters, none for marks on the one before."""
    return sum(_cells(character) for character in text)


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, none wider than ``width``: broken at spaces, and within words that are wider.

    Args:
        text: the text; its own line ends stay.
        width: number of columns, at least 2.
    """
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if cells(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            *full, line = _pieces(word, width)
            lines += full
        lines.append(line)
    return lines


def _pieces(word: str, width: int) -> list[str]:
    """A word in pieces that fit, at least one."""
    pieces = [""]
    for character in word:
        if cells(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def side_by_side(texts: Mapping[str, str], width: int | None = None) -> str:
    """Texts in columns of equal width, each under its title. A single text has the full width and no title.

    Args:
        texts: the texts by title.
        width: number of columns; None: those of the terminal.
    """
    count, total = len(texts), width or terminal_width()
    column = (total - len(_MARGIN) * (count - 1)) // count
    blocks = [wrapped(printable(text), column) for text in texts.values()]
    if count > 1:
        blocks = [[title, "-" * column, *block] for title, block in zip(texts, blocks, strict=True)]
    height = max(map(len, blocks))
    return "\n".join(
        _MARGIN.join(_padded(block[i] if i < len(block) else "", column) for block in blocks).rstrip()
        for i in range(height)
    )


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cells(text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header: the first column to the left, the others to the right."""
    every = [header, *rows]
    widths = [max(cells(row[i]) for row in every) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = [_padded(row[0], widths[0])]
        parts += [" " * (width - cells(text)) + text for text, width in zip(row[1:], widths[1:], strict=True)]
        return _MARGIN.join(parts).rstrip()

    return "\n".join(map(line, every))


__all__ = ["cells", "printable", "side_by_side", "table", "terminal_width", "wrapped"]
