"""Files of updates: reading returns the written numbers, and damage is reported."""

import math
from pathlib import Path

import pytest

from meerkat_engine.engine.errors import RunError
from meerkat_engine.engine.updates import read_updates, write_updates

UPDATES = [(0, 1e-2, 0.1), ((1 << 64) - 1, 1 / 3, -1.1754943508222875e-38), (7, 0.0, math.nan)]


def test_reading_returns_the_written_numbers(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    write_updates(path, UPDATES[:1])
    write_updates(path, UPDATES)
    assert repr(read_updates(path)) == repr(UPDATES)
    assert path.read_text().splitlines()[2] == "[7, 0.0, null]"
    write_updates(path, [])
    assert read_updates(path) == []


@pytest.mark.parametrize(
    "line",
    ["[1, 0.1", "{}", "[1, 0.1]", "[-1, 0.1, 0.2]", f"[{1 << 64}, 0.1, 0.2]", "[1.0, 0.1, 0.2]", "[true, 0.1, 0.2]",
     "[1, null, 0.2]", "[1, NaN, 0.2]", "[1, 0.1, Infinity]", "[1, 0.1, NaN]", '[1, 0.1, "0.2"]', "[1, 0.1, true]"],
)  # fmt: skip
def test_an_invalid_update_is_reported_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "updates.jsonl"
    path.write_text(f"[1, 0.1, 0.2]\n{line}\n")
    with pytest.raises(RunError, match="line 2: "):
        read_updates(path)


def test_missing_files_and_directories_are_reported(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read the updates .*missing"):
        read_updates(tmp_path / "missing")
    with pytest.raises(RunError, match="cannot write"):
        write_updates(tmp_path / "missing" / "updates.jsonl", UPDATES)
