"""Texts beside each other: nothing is lost, nothing is too wide, and nothing controls the terminal."""

import re

from hypothesis import given
from hypothesis import strategies as st

from meerkat_engine.fed.inference.columns import cells, printable, side_by_side, table, wrapped

_TEXTS = st.text(st.sampled_from("ab é漢\u0301字 \n"), max_size=60)


@given(_TEXTS, st.integers(2, 12))
def test_wrapped_lines_fit_and_lose_only_spaces(text: str, width: int) -> None:
    lines = wrapped(text, width)
    assert max(map(cells, lines)) <= width
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)


def test_lines_break_at_spaces() -> None:
    assert wrapped("the film was fine\nand long", 9) == ["the film", "was fine", "and long"]
    assert wrapped("unbelievable film", 6) == ["unbeli", "evable", "film"]
    assert wrapped("漢字漢", 4) == ["漢字", "漢"]
    assert wrapped("", 4) == [""]


@given(_TEXTS, _TEXTS)
def test_columns_fit_and_are_aligned(left: str, right: str) -> None:
    lines = side_by_side({"before": left, "after": right}, 21).splitlines()
    assert max(map(cells, lines)) <= 21
    assert lines[0] == "before     after"


def test_two_texts() -> None:
    shown = side_by_side({"before": "漢字 the film was fine", "after": "no"}, 22)
    assert shown == "before      after\n----------  ----------\n漢字 the    no\nfilm was\nfine"
    assert side_by_side({"model": "a film"}, 22) == "a film"


def test_a_table_has_its_numbers_to_the_right() -> None:
    assert table(["label", "before"], [["no", "0.5"], ["longer", "0.25"]]) == (
        "label   before\nno         0.5\nlonger    0.25"
    )


def test_control_characters_are_written_as_escapes() -> None:
    assert printable("a\x1b[2J\r\tb\u202e\nc") == "a\\x1b[2J\\r    b\\u202e\nc"
    assert printable("né 漢 🦦") == "né 漢 🦦"
