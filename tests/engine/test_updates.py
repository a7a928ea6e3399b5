"""Logs of updates: their files, what they refuse to hold, damage, and how they are joined."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_engine import UpdateLog
from meerkat_engine.engine.errors import LedgerError, RunError

from helpers.damage import BYTE_CHANGES, flips

UPDATES = [(0, 1e-2, 0.1), ((1 << 64) - 1, 1 / 3, -1.1754943508222875e-38), (7, 0.0, math.nan)]
LOG = UpdateLog(mask="a" * 64, start="b" * 64, updates=UPDATES, end="c" * 64)
TWO_GROUPS = UpdateLog(
    mask="a" * 64, start="b" * 64, updates=[(1, (0.1, 1 / 3), 0.5), (2, (0.0, 1e-9), math.nan)],
    groups=(("w",), ("v", "größe")),
)  # fmt: skip
NOTHING = UpdateLog(mask="a" * 64, start="b" * 64, updates=[])


@pytest.mark.parametrize("log", [LOG, TWO_GROUPS, NOTHING], ids=["one group", "two groups", "no updates"])
def test_loading_returns_the_saved_log(tmp_path: Path, log: UpdateLog) -> None:
    path = tmp_path / "updates.jsonl"
    LOG.save(path)
    log.save(path)
    assert UpdateLog.load(path) == log
    assert repr(UpdateLog.load(path)) == repr(log)


def test_each_update_is_a_line_of_json(tmp_path: Path) -> None:
    LOG.save(tmp_path / "updates.jsonl")
    header, *updates = map(json.loads, (tmp_path / "updates.jsonl").read_text().splitlines())
    assert header["format"] == "meerkat-updates/2"
    assert (header["stream_version"], header["mask"], header["start"]) == (1, LOG.mask, LOG.start)
    assert updates[0] == [0, 0.01, 0.1]
    assert updates[2] == [7, 0.0, None]


def test_numpy_numbers_are_taken_as_plain_ones() -> None:
    log = replace(LOG, updates=[(np.uint64(3), np.float64(0.5), np.float32("nan"))])
    assert repr(log.updates) == "((3, 0.5, nan),)"


INVALID: list[tuple[Any, str]] = [
    ((-1, 0.1, 0.2), "seed"), ((1 << 64, 0.1, 0.2), "seed"), ((1.0, 0.1, 0.2), "seed"), ((True, 0.1, 0.2), "seed"),
    (("1", 0.1, 0.2), "seed"), ((1, None, 0.2), "lr"), ((1, math.inf, 0.2), "lr"), ((1, math.nan, 0.2), "lr"),
    ((1, 10**400, 0.2), "lr"), ((1, (0.1, 0.2), 0.3), "lr"), ((1, 0.1, math.inf), "g"), ((1, 0.1, "0.2"), "g"),
    ((1, 0.1, True), "g"), ((1, 0.1, 1e39), "g"), ((1, 1e20, 1e20), "g"), ((1, 0.1), "not"), (None, "not"),
]  # fmt: skip


@pytest.mark.parametrize(("update", "named"), INVALID)
def test_what_a_file_could_not_hold_is_refused(update: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"update 1: .*{named}"):
        replace(LOG, updates=[UPDATES[0], update])


@pytest.mark.parametrize("lr", [0.1, (0.1,), (0.1, 0.2, 0.3), (0.1, math.nan)])
def test_with_two_groups_an_update_has_two_learning_rates(lr: Any) -> None:
    with pytest.raises(ValueError, match="update 0: lr"):
        replace(TWO_GROUPS, updates=[(1, lr, 0.5)])


@pytest.mark.parametrize("groups", [(("w",),), (("w",), ("w", "v")), ((1,), (2,))])
def test_impossible_groups_are_refused(groups: Any) -> None:
    with pytest.raises(ValueError, match="groups must be"):
        replace(TWO_GROUPS, groups=groups)


@pytest.mark.parametrize(
    "line",
    ["[1, 0.1", "{}", "[1, 0.1]", "[-1, 0.1, 0.2]", f"[{1 << 64}, 0.1, 0.2]", "[1.0, 0.1, 0.2]", "[true, 0.1, 0.2]",
     "[1, null, 0.2]", "[1, NaN, 0.2]", "[1, 0.1, Infinity]", "[1, 0.1, NaN]", '[1, 0.1, "0.2"]', "[1, 0.1, true]",
     "[1, 1e999, 0.2]", "[1, [0.1], 0.2]", "\xff"],
)  # fmt: skip
def test_an_invalid_update_is_reported_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "updates.jsonl"
    LOG.save(path)
    lines = path.read_bytes().splitlines()
    lines[2] = line.encode("latin-1")
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(RunError, match=r"updates.jsonl, line 3: .*the file is damaged"):
        UpdateLog.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 0.1, 0.2]\n", "line 1: no header, so the file does not say which mask"),
        ('{"format": "meerkat-updates/3"}\n', "line 1: not the header of a log of updates"),
        ('{"format": "meerkat-updates/2"}\n', "line 1: the header must have format, stream_version"),
        ("", "line 1: not JSON"),
    ],
)
def test_files_of_other_formats_are_rejected(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "updates.jsonl"
    path.write_text(content)
    with pytest.raises(RunError, match=message):
        UpdateLog.load(path)


def test_every_changed_byte_and_every_missing_end_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    TWO_GROUPS.save(path)
    good = path.read_bytes()
    damaged = [*flips(good, BYTE_CHANGES), *(good[:length] for length in range(len(good)))]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(RunError, match=r"updates.jsonl, line \d+: "):
            UpdateLog.load(path)


def test_missing_files_and_directories_are_reported(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read the updates .*missing"):
        UpdateLog.load(tmp_path / "missing")
    with pytest.raises(RunError, match="cannot write"):
        LOG.save(tmp_path / "missing" / "updates.jsonl")


def test_a_log_is_joined_with_that_of_the_continued_training_only() -> None:
    following = replace(LOG, start=LOG.end, end="d" * 64)
    joined = LOG + following
    assert (joined.start, joined.end, len(joined.updates)) == (LOG.start, following.end, 6)
    for other, message in (
        (LOG, "starts from masked weights bbbbbbbbbbbb, the log before it ends with cccccccccccc"),
        (replace(following, mask="e" * 64), "has mask"),
        (replace(following, stream_version=2), "has stream_version 2"),
        (replace(TWO_GROUPS, start=LOG.end), "has groups"),
    ):
        with pytest.raises(LedgerError, match=message):
            LOG + other
    with pytest.raises(LedgerError, match="ends with unknown ones"):
        replace(LOG, end="") + following
