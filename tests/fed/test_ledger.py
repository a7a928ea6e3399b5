"""The ledger file: exact floats, torn and damaged lines, full disks."""

import json
import math
import os
import resource
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat_engine.errors import LedgerError
from meerkat_engine.fed.ledger import Header, LedgerWriter, Round, read_ledger
from meerkat_engine.fed.terms import Terms

TERMS = Terms(seed=2**63 + 1, eps=1e-3, lr=0.1, local_steps=2, elements=5, mask_digest="ab" * 32)
HEADER = Header(terms=TERMS, base="cd" * 32, method="meerkat", clients=2, weighting="examples")


def line(round: int, scalars: list[float] | None = None) -> Round:
    return Round(round=round, lr=[0.1, 0.1], scalars=scalars or [0.5, -1.25], clients={0: [1.0, 2.0], 1: [0.25]})


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path, HEADER) as writer:
        for round in (1, 2, 3):
            writer.append(line(round))
    return path


def test_what_was_written_is_read(ledger: Path) -> None:
    found = read_ledger(ledger)
    assert found.header == HEADER
    assert found.rounds == [line(1), line(2), line(3)]
    assert len(list(found.steps())) == 6
    assert all(json.loads(text) for text in ledger.read_text().splitlines())


@given(pattern=st.integers(0, 2**32 - 1))
def test_fp32_scalars_survive_exactly(tmp_path_factory: pytest.TempPathFactory, pattern: int) -> None:
    (value,) = struct.unpack("<f", struct.pack("<I", pattern))
    path = tmp_path_factory.mktemp("ledger") / "l"
    with LedgerWriter(path, HEADER) as writer:
        if not math.isfinite(value):
            with pytest.raises(ValueError, match="not JSON compliant"):
                writer.append(line(1, [value, 0.0]))
            return
        writer.append(line(1, [value, 0.0]))
    assert struct.pack("<f", read_ledger(path).rounds[0].scalars[0]) == struct.pack("<I", pattern)


def test_a_round_is_fsynced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path = tmp_path / "ledger.jsonl"
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    with LedgerWriter(path, HEADER) as writer:
        writer.append(line(1))
        assert synced[-1] == path.read_bytes()
        assert len(synced) == 2  # header and round


def test_a_torn_last_line_is_dropped_with_a_warning(ledger: Path) -> None:
    data = ledger.read_bytes()
    start = data.rstrip(b"\n").rindex(b"\n") + 1
    for cut in (start + 1, start + 20, len(data) - 1):
        ledger.write_bytes(data[:cut])
        with pytest.warns(UserWarning, match="dropped the torn last line 4"):
            assert read_ledger(ledger).rounds == [line(1), line(2)]


def test_any_flipped_byte_is_noticed(ledger: Path) -> None:
    data = ledger.read_bytes()
    for at in range(len(data) - 1):
        damaged = bytearray(data)
        damaged[at] ^= 1
        ledger.write_bytes(damaged)
        with pytest.raises(LedgerError, match=r"line \d"):
            read_ledger(ledger)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 3], "line 3: holds round 3 where round 2 belongs"),
        ([0, 1, 1, 2], "line 3: holds round 1 where round 2 belongs"),
        ([0, 2, 1], "line 2: holds round 2 where round 1 belongs"),
        ([1, 2], "line 1: format None"),
        ([], "has no header"),
    ],
    ids=["missing", "repeated", "reordered", "no header", "empty"],
)
def test_lines_out_of_place_are_named(ledger: Path, order: list[int], message: str) -> None:
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[i] for i in order))
    with pytest.raises(LedgerError, match=message):
        read_ledger(ledger)


def test_nothing_is_overwritten(ledger: Path) -> None:
    before = ledger.read_bytes()
    with pytest.raises(FileExistsError):
        LedgerWriter(ledger, HEADER)
    assert ledger.read_bytes() == before


@pytest.fixture
def small_disk(ledger: Path) -> Iterator[None]:
    """Files may grow no further than 40 bytes beyond the ledger, which is the kernel's own way to say no."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_leaves_the_complete_rounds(tmp_path: Path, ledger: Path, small_disk: None) -> None:
    path = tmp_path / "second"
    with LedgerWriter(path, HEADER) as writer:
        fill_up(path, writer)


def fill_up(path: Path, writer: LedgerWriter) -> None:
    writer.append(line(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError, match=r"No space left|File too large"):
        writer.append(line(2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert read_ledger(path).rounds == [line(1)]
    writer.append(line(2))
    assert read_ledger(path).rounds == [line(1), line(2)]
