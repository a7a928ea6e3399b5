"""The text of a file of settings: its bytes are a format, and any text comes back from it."""

import tomllib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from meerkat_engine.fed.config.toml import parse_toml, to_toml


def test_the_text_of_a_file_of_settings_does_not_change() -> None:
    """The text is as the package tomli_w wrote it, byte for byte."""
    settings = {"rounds": 3, "model": 'a\t"b"\\\x7f\x00é\n', "data_dir": Path("d"), "lr": 1e-5, "clip": 2.0}
    assert to_toml(settings) == (
        'rounds = 3\n\n[model]\nsource = "a\t\\"b\\"\\\\\\u007f\\u0000é\\n"\n\n[data]\ndirectory = "d"\n\n'
        "[step]\nlr = 1e-05\n\n[aggregation]\nclip = 2.0\n"
    )
    assert to_toml({"lr": 0.5}) == "[step]\nlr = 0.5\n"
    assert to_toml({}) == ""


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False), st.integers(-(2**63), 2**63 - 1))
def test_any_value_comes_back_from_the_file(text: str, number: float, integer: int) -> None:
    written = {"model": text, "lr": number, "seed": integer}
    assert parse_toml(to_toml(written), "here") == written
    assert tomllib.loads(to_toml(written)) == {
        "seed": integer, "model": {"source": text}, "step": {"lr": number},
    }  # fmt: skip
