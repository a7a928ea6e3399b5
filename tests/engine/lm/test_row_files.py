"""Rows of files in every format: the same rows with the same text, and one clear error for what is wrong."""

import csv
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meerkat_engine.engine.errors import DataError
from meerkat_engine.engine.lm.row_files import read_rows

# Characters at which some readers split a text, or which they change.
ODD = ["a\u2028b\u2029c", "a\x85b\x0bc\x0cd\x1ce", "a\rb", "a\nb\r\nc", "\ufeffa", " a ", 'say "a", b;\tc', "",
       "0012", "a\n\ufeffb", "\U0001f600 é", "x" * 200_000]  # fmt: skip
ROWS = [{"prompt": text, "completion": f"{number} {text}"} for number, text in enumerate(ODD)]


def write_json_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def write_json(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(json.dumps(rows, ensure_ascii=False, indent=1).encode())


def write_table(separator: str) -> Callable[[Path, list[dict[str, str]]], None]:
    def write(path: Path, rows: list[dict[str, str]]) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=separator, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)

    return write


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)


WRITERS = {"jsonl": write_json_lines, "ndjson": write_json_lines, "json": write_json, "data": write_json_lines,
           "csv": write_table(","), "tsv": write_table("\t"), "parquet": write_parquet}  # fmt: skip


@pytest.mark.parametrize("end", [*WRITERS, "JSONL", "CSV", "Parquet"])
def test_every_format_gives_the_same_rows_and_changes_no_character(end: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{end}"
    WRITERS[end.lower()](path, ROWS)
    located = read_rows(path)
    assert located.rows == ROWS
    assert len(located.places) == len(ROWS)


@pytest.mark.parametrize("end", ["jsonl", "json", "csv", "tsv"])
def test_a_byte_order_mark_is_no_part_of_the_text(end: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{end}"
    WRITERS[end](path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_rows(path).rows == ROWS


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_places_are_the_lines_where_rows_begin(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'a,b\r\n"x\r\ny\nz",1\r\n\r\n2,3')
    assert read_rows(path).places == [f"{path}, line 2", f"{path}, line 6"]
    assert read_rows(path).rows == [{"a": "x\r\ny\nz", "b": "1"}, {"a": "2", "b": "3"}]
    path = written(tmp_path, "a.jsonl", '\n{"a": 1}\r\n\n\ufeff{"a": 2}')
    assert read_rows(path).places == [f"{path}, line 2", f"{path}, line 4"]
    path = written(tmp_path, "a.json", '[{"a": 1},\n\n{"a": 2}]')
    assert read_rows(path).places == [f"{path}, row 1", f"{path}, row 2"]
    write_parquet(tmp_path / "a.parquet", ROWS)
    assert read_rows(tmp_path / "a.parquet").places[6] == f"{tmp_path / 'a.parquet'}, row 7"


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('{"version": "1", "tags": ["x"], "data": [{"a": 1}, {"a": 2}]}', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('{"a": 1,\n "b": [1]}', [{"a": 1, "b": [1]}]),
        (json.dumps({"messages": MESSAGES}), [{"messages": MESSAGES}]),
        (json.dumps({"conversations": TURNS}), [{"conversations": TURNS}]),
        (json.dumps({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}),
         [{"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}]),
        (json.dumps({"rows": [{"messages": MESSAGES}]}), [{"messages": MESSAGES}]),
    ],
    ids=["array", "list in an object", "lines", "one object", "chat", "turns", "prompt and completion", "chats"],
)  # fmt: skip
def test_shapes_of_json_files(content: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "a.json", content)).rows == rows


def test_numbers_keep_the_type_that_the_file_gives_them(tmp_path: Path) -> None:
    (row,) = read_rows(written(tmp_path, "a.jsonl", '{"a": 1e400, "b": -Infinity, "c": 12345678901234567890}')).rows
    assert row == {"a": float("inf"), "b": float("-inf"), "c": 12345678901234567890}
    (row,) = read_rows(written(tmp_path, "a.csv", "a,b,c\n1,NaN,")).rows
    assert row == {"a": "1", "b": "NaN", "c": ""}


def test_nested_values_of_parquet_are_lists_and_dicts(tmp_path: Path) -> None:
    columns = {
        "messages": pa.array([MESSAGES, None]),
        "scores": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        "label": pa.array(["spam", "ham"]).dictionary_encode(),
        "price": pa.array([Decimal("1.50"), None]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet").rows == [
        {"messages": MESSAGES, "scores": {"a": 1}, "label": "spam", "price": Decimal("1.50")},
        {"messages": None, "scores": {}, "label": "ham", "price": None},
    ]


def test_reading_a_table_leaves_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert read_rows(written(tmp_path, "a.csv", f"a\n{'x' * (before + 1)}")).rows[0]["a"] == "x" * (before + 1)
    with pytest.raises(DataError):
        read_rows(written(tmp_path, "a.csv", 'a\n"'))
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": ', r"a\.jsonl, line 2: cannot be read as JSON"),
        ("a.jsonl", '{"a": 1, "b": {"c": 1, "c": 2}}', "line 1: .*an object has the field 'c' twice"),
        ("a.jsonl", f'{{"a": {"9" * 5000}}}', "line 1: cannot be read as JSON"),
        ("a.jsonl", '{"a": 1}\n' + '{"a":' * 100_000, "line 2: cannot be read as JSON"),
        ("a.jsonl", '{"a": 1}\r{"a": 2}', "line 1: cannot be read as JSON .*Extra data"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', r"line 2: byte 17 of the file \(0xff\) is not UTF-8; save"),
        ("a.jsonl", '{"a": "é"}'.encode("utf-16"), "line 1: byte 1 .*; the file looks like UTF-16; save"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', r"a\.json: cannot be read as JSON \(.* line 2 column 6"),
        ("a.json", "[" * 100_000, r"a\.json: cannot be read as JSON"),
        ("a.json", '[{"a": 1}, 2]', r"a\.json, row 2: expected an object, got int"),
        ("a.json", '"a"', r"a\.json: expected an array of objects, got str"),
        ("a.json", '{"a": 1}\n{"a": }', r"a\.json, line 2: cannot be read as JSON"),
        ("a.json", '{"a": 1}\n[2]', r"a\.json, line 2: expected an object, got list"),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', r"several lists of objects, \['test', 'train'\];"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv, line 3: the row has 3 values, the header 2 names; put"),
        ("a.tsv", "a\tb\n1\n", r"a\.tsv, line 2: the row has 1 values, the header 2 names"),
        ("a.csv", 'a,b\n"1\n2",3\n4', "line 4: the row has 1 values, the header 2 names"),
        ("a.csv", "a,,c\n1,2,3", "line 1: column 2 has no name"),
        ("a.csv", "a,b,a\n1,2,3", "line 1: two columns are named 'a'"),
        ("a.csv", "a;b\n1;2", "line 1: the header 'a;b' is one name, so the values are not separated as"),
        ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', r"line 3: the row cannot be read \(a quote is opened and never closed\)"),
        ("a.csv", 'a,b\n"1" x,2\n', r"line 2: the row cannot be read \(',' expected after '\"'\)"),
        ("a.csv", "a,b\r1,2\r", r"line 1: the row cannot be read \(a carriage return outside quotes\)"),
        ("a.csv", b"a,b\n1,\xe9\n", r"line 2: byte 7 of the file \(0xe9\) is not UTF-8; save"),
        ("a.parquet", b"PAR1" + bytes(40) + b"PAR1", r"a\.parquet: cannot be read as Parquet"),
        ("a.parquet", "a,b\n", r"a\.parquet: cannot be read as Parquet"),
        ("a.txt", "a question\n", r"a\.txt: .* does not begin with an object; .* \.jsonl and .*\.csv, \.tsv"),
        ("a", b"\x1f\x8b\x08", "does not begin with an object"),
        ("a.txt", '{"a": 1}\nb', r"a\.txt, line 2: cannot be read as JSON"),
        *[(f"a.{end}", "\n\n", "has no examples") for end in ("jsonl", "json", "csv", "txt")],
        *[(f"b.{end}", "", "has no examples") for end in ("jsonl", "json", "csv", "tsv", "txt")],
        ("a.csv", "a,b\n", "has no examples"),
        ("a.json", "[]", "has no examples"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_error(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_of_parquet_with_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    with pytest.raises(DataError, match=r"a\.parquet: two columns are named 'a'; rename or remove one"):
        read_rows(path)
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match=r"a\.parquet has no examples"):
        read_rows(path)


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv", "none.parquet", "folder", "folder.json", "a\0b.jsonl"])
def test_files_that_cannot_be_read_are_one_error(name: str, tmp_path: Path) -> None:
    for folder in ("folder", "folder.json"):
        (tmp_path / folder).mkdir()
    with pytest.raises(DataError, match=r"cannot read ") as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["alpaca_demo", "chat_demo", "sst2"])
def test_shared_files_are_read(name: str, shared_data: Path) -> None:
    for split in ("train", "validation"):
        path = shared_data / name / f"{split}.jsonl"
        located = read_rows(path)
        assert located.places[-1] == f"{path}, line {len(located.rows)}"
