"""The ledger file: exact floats, torn lines, damaged lines, full disks."""

import dataclasses
import json
import math
import os
import resource
import signal
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_engine.engine.errors import LedgerError
from meerkat_engine.fed.aggregation import Aggregation, Rule, StoppedWeight
from meerkat_engine.fed.ledger.file import LedgerHeader, LedgerWriter, RoundRecord, read_ledger
from meerkat_engine.fed.terms import Terms

from helpers.constants import FUZZ

TERMS = Terms(seed=2**63 + 1, eps=1e-3, lr=0.1, local_steps=2, elements=5, mask_digest="ab" * 32)
HEADER = LedgerHeader(
    terms=TERMS, base="cd" * 32, method="meerkat", clients=2, aggregation=Aggregation(rule=Rule.MEDIAN)
)


def line(round: int, scalars: list[float] | None = None) -> RoundRecord:
    return RoundRecord(
        round=round,
        lr=[0.1, 0.1],
        scalars=scalars or [0.5, -1.25],
        clients={0: [1.0, math.nan], 1: [0.25]},
        examples={0: 7, 1: 9},
        loss=0.7,
        steps=3,
        bytes_up=100,
        bytes_down=90,
        rejected={"client 1: damaged": 2},
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path, HEADER) as writer:
        for round in (1, 2, 3):
            writer.append(line(round))
    return path


def test_a_written_ledger_reads_back_the_same(ledger: Path) -> None:
    content = read_ledger(ledger)
    assert content.header == HEADER
    assert content.rounds == [line(1), line(2), line(3)]
    assert len(list(content.updates())) == 6
    assert all(json.loads(text) for text in ledger.read_text().splitlines())


@pytest.mark.parametrize("stopped_weight", StoppedWeight)
def test_the_header_has_what_happens_to_weights_only_if_they_are_shared(
    tmp_path: Path, stopped_weight: StoppedWeight
) -> None:
    """Where they are kept, it has the bytes that it had before there was a choice."""
    aggregation = Aggregation(stopped_weight=stopped_weight)
    header = dataclasses.replace(HEADER, aggregation=aggregation)
    with LedgerWriter(tmp_path / "l", header):
        pass
    assert read_ledger(tmp_path / "l").header == header
    written = json.loads((tmp_path / "l").read_text())["aggregation"]
    assert written.get("stopped_weight") == (None if stopped_weight is StoppedWeight.KEEP else "share")


@given(pattern=st.integers(0, 2**32 - 1))
def test_fp32_scalars_are_preserved_exactly(tmp_path_factory: pytest.TempPathFactory, pattern: int) -> None:
    (value,) = struct.unpack("<f", struct.pack("<I", pattern))
    path = tmp_path_factory.mktemp("ledger") / "l"
    with LedgerWriter(path, HEADER) as writer:
        if not math.isfinite(value):
            with pytest.raises(ValueError, match="not JSON compliant"):
                writer.append(line(1, [value, 0.0]))
            return
        writer.append(line(1, [value, 0.0]))
    assert struct.pack("<f", read_ledger(path).rounds[0].scalars[0]) == struct.pack("<I", pattern)


def test_append_fsyncs_the_line_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path = tmp_path / "ledger.jsonl"
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    with LedgerWriter(path, HEADER) as writer:
        writer.append(line(1))
        assert synced[-1] == path.read_bytes()
        assert len(synced) == 3  # the header, the directory, the round


def test_a_torn_last_line_is_dropped_with_a_warning(ledger: Path) -> None:
    data = ledger.read_bytes()
    start = data.rstrip(b"\n").rindex(b"\n") + 1
    for cut in (start + 1, start + 20, len(data) - 1):
        ledger.write_bytes(data[:cut])
        with pytest.warns(UserWarning, match="dropped the torn last line 4"):
            assert read_ledger(ledger).rounds == [line(1), line(2)]


def test_a_skipped_query_is_null_in_the_file(ledger: Path) -> None:
    assert json.loads(ledger.read_text().splitlines()[1])["clients"] == {"0": [1.0, None], "1": [0.25]}
    assert math.isnan(read_ledger(ledger).rounds[0].clients[0][1])


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_is_an_error(ledger: Path, bit: int) -> None:
    """Every bit of every byte, including the newline at the end."""
    data = ledger.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << bit
        ledger.write_bytes(damaged)
        with pytest.raises(LedgerError, match=r"ledger.jsonl, line \d"):
            read_ledger(ledger)


@settings(max_examples=100 * FUZZ, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_an_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    with LedgerWriter(path, HEADER) as writer:
        for round in range(1, data.draw(st.integers(1, 4)) + 1):
            writer.append(line(round, data.draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False),
                                                         min_size=2, max_size=2))))  # fmt: skip
    original = path.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != original[position]))
    path.write_bytes(original[:position] + bytes([byte]) + original[position + 1 :])
    with pytest.raises(LedgerError, match=r"ledger.jsonl, line \d"):
        read_ledger(path)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 3], "line 3: the checksum does not match; .* not written directly after the lines before"),
        ([0, 1, 1, 2], "line 3: the checksum"),
        ([0, 2, 1], "line 2: the checksum"),
        ([0, 2, 3], "line 2: the checksum"),
        ([1, 2], "line 1: the checksum"),
        ([], "has no header"),
    ],
    ids=["missing", "repeated", "reordered", "first missing", "no header", "empty"],
)
def test_missing_repeated_and_reordered_lines_are_named(ledger: Path, order: list[int], message: str) -> None:
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[i] for i in order))
    with pytest.raises(LedgerError, match=message):
        read_ledger(ledger)


def test_a_line_of_another_run_is_an_error(ledger: Path, tmp_path: Path) -> None:
    """The line is intact and of the right round, but was not written after the lines before it."""
    with LedgerWriter(tmp_path / "other", HEADER) as writer:
        writer.append(line(1, [9.0, 9.0]))
        writer.append(line(2, [9.0, 9.0]))
    lines, foreign = ledger.read_bytes().splitlines(True), (tmp_path / "other").read_bytes().splitlines(True)
    ledger.write_bytes(b"".join([*lines[:2], foreign[2], lines[3]]))
    with pytest.raises(LedgerError, match="line 3: the checksum"):
        read_ledger(ledger)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "meerkat-ledger/2", "line 1: format is 'meerkat-ledger/2', this version reads 'meerkat-ledger/3'"),
        ("stream_version", 2, "line 1: stream version is 2, this version reads 1"),
        ("queries", "two", "line 1: the header is damaged"),
    ],
)
def test_another_format_or_stream_version_is_an_error(tmp_path: Path, field: str, value: object, message: str) -> None:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path, HEADER):
        pass
    path.write_text(with_crc(json.loads(path.read_text()) | {field: value}) + "\n")
    with pytest.raises(LedgerError, match=message):
        read_ledger(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": [0.1, 0.2]}, "line 2: the learning rates do not follow from the header"),
        ({"scalars": [0.1, 0.2]}, "line 2: a scalar is not a finite fp32 number"),
        ({"scalars": [1e300, 0.5]}, "line 2: a scalar is not a finite fp32 number"),
        ({"scalars": [0.5]}, "line 2: 2 learning rates and 1 scalars, 2 and 2 were expected"),
        ({"clients": {"0": [math.inf]}}, "line 2: a scalar is not a finite fp32 number"),
        ({"clients": {str(math.inf): [1]}}, "line 2: the round is damaged"),
        ({"steps": math.inf}, "line 2: the round is damaged"),
        ({"clients": math.inf}, "line 2: the round is damaged"),
        ({"round": 2}, "line 2: the line is of round 2, round 1 was expected"),
    ],
)  # fmt: skip
def test_invalid_fields_under_a_valid_checksum_are_errors(
    ledger: Path, change: dict[str, object], message: str
) -> None:
    """Anyone can compute the checksum of a forged line."""
    header, first = ledger.read_text().splitlines()[:2]
    ledger.write_text(f"{header}\n{with_crc(json.loads(first) | change, int(json.loads(header)['crc32'], 16))}\n")
    with pytest.raises(LedgerError, match=message):
        read_ledger(ledger)


def test_deeply_nested_json_is_an_error(ledger: Path) -> None:
    header = ledger.read_text().splitlines()[0]
    body = '{"round":' + "[" * 100_000
    crc = zlib.crc32(body.encode(), int(json.loads(header)["crc32"], 16))
    ledger.write_text(f'{header}\n{body},"crc32":"{crc:08x}"}}\n')
    with pytest.raises(LedgerError, match="line 2: the line is not JSON"):
        read_ledger(ledger)


def with_crc(fields: dict[str, object], previous_crc: int = 0) -> str:
    """A line with these fields and the correct checksum."""
    body = json.dumps({name: value for name, value in fields.items() if name != "crc32"}, separators=(",", ":"))[:-1]
    return f'{body},"crc32":"{zlib.crc32(body.encode(), previous_crc):08x}"}}'


def test_writing_continues_after_the_last_complete_line(ledger: Path) -> None:
    original = ledger.read_bytes()
    with LedgerWriter(ledger, HEADER, read_ledger(ledger)) as writer:
        writer.append(line(4))
    longer = ledger.read_bytes()
    assert longer.startswith(original)
    ledger.write_bytes(longer[: len(original) + 30])
    with pytest.warns(UserWarning, match="dropped the torn last line 5"):
        content = read_ledger(ledger)
    with LedgerWriter(ledger, HEADER, content) as writer:
        writer.append(line(4))
    assert ledger.read_bytes() == longer


def test_an_existing_ledger_is_not_overwritten(ledger: Path) -> None:
    before = ledger.read_bytes()
    with pytest.raises(FileExistsError):
        LedgerWriter(ledger, HEADER)
    assert ledger.read_bytes() == before


@pytest.fixture
def small_disk(ledger: Path) -> Iterator[None]:
    """Restores the limit of file sizes (RLIMIT_FSIZE), with which ``fill_up`` simulates a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_complete_rounds(tmp_path: Path, ledger: Path, small_disk: None) -> None:
    path = tmp_path / "second"
    with LedgerWriter(path, HEADER) as writer:
        fill_up(path, writer)


def fill_up(path: Path, writer: LedgerWriter) -> None:
    """Appends a round to a file that may grow by 40 bytes only, then once more without the limit."""
    writer.append(line(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError, match="File too large"):
        writer.append(line(2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert read_ledger(path).rounds == [line(1)]
    writer.append(line(2))
    assert read_ledger(path).rounds == [line(1), line(2)]
