"""Reading rows of tasks and custom data, from disk and from the hub; calibration text."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meerkat_engine.engine.errors import DataError
from meerkat_engine.engine.lm.data import (
    calibration_texts,
    custom_rows,
    stratified_sample,
    task_rows,
    token_batches,
)
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.hub import HubSource
from meerkat_engine.engine.lm.row_files import read_rows
from meerkat_engine.engine.lm.tasks import SST2, TASKS, Task, custom_task

from helpers.models import make_byte_tokenizer, make_tokenizer
from helpers.prompts import WORDS


def test_task_rows_are_read_from_a_directory(write_jsonl: Callable[[str, list[str]], Path]) -> None:
    path = write_jsonl("sst2/train.jsonl", ['{"sentence": "good", "label": 1}', "", '{"sentence": "bad", "label": 0}'])
    assert [row["label"] for row in task_rows(SST2, "train", path.parent.parent)] == [1, 0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"sentence": "good", "label": 1}', '{"sentence": '], r"train\.jsonl, line 2: cannot be read as JSON"),
        (["[1]"], "line 1: expected an object, got list"),
        (['{"sentence": "a", "label": 7}'], "line 1: label 7 is outside"),
        ([], "has no examples"),
    ],
    ids=["invalid JSON", "no object", "invalid label", "empty"],
)
def test_error_names_the_invalid_line_or_example(
    write_jsonl: Callable[[str, list[str]], Path], lines: list[str], message: str
) -> None:
    path = write_jsonl("sst2/train.jsonl", lines)
    with pytest.raises(DataError, match=message):
        task_rows(SST2, "train", path.parent.parent)


SURROGATE = r'{"sentence": "a \ud83d film", "label": 1}'


def test_odd_json_is_an_error_that_names_the_line(write_jsonl: Callable[[str, list[str]], Path]) -> None:
    good = '{"sentence": "good", "label": 1}'
    for line, message in (
        ('{"a":' * 100_000, "line 2: cannot be read as JSON"),
        (f'{{"sentence": "a", "label": {"9" * 5000}}}', "line 2: cannot be read as JSON"),
        ('{"sentence": NaN, "label": 1}', "line 2: field 'sentence' must be text, got float"),
        ('{"sentence": "a", "label": NaN}', "line 2: label nan is outside"),
        (SURROGATE, r"line 2: field 'sentence' has half of a surrogate pair \('\\ud83d'\) at character 3"),
    ):
        path = write_jsonl("sst2/train.jsonl", [good, line])
        with pytest.raises(DataError, match=message):
            task_rows(SST2, "train", path.parent.parent)


def test_byte_order_marks_are_skipped(tmp_path: Path) -> None:
    """Each file has one at its beginning, and ``cat`` of two files one in the middle."""
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "\ufeffa"}\n\ufeff{"text": "b"}\n\ufeff\n', encoding="utf-8")
    assert read_rows(tmp_path / "a.jsonl").rows == [{"text": "\ufeffa"}, {"text": "b"}]


@pytest.mark.parametrize("count", [1, 2, 7, 10, 99, 150, 200, 1000])
def test_a_stratified_sample_has_the_shares_of_the_classes(count: int) -> None:
    labels = [0] * 100 + [1] * 50 + [2] * 50  # sorted by class
    sample = stratified_sample(labels, count, 5)
    assert sample == sorted(set(sample))
    assert len(sample) == min(count, 200)
    for label in range(3):
        assert abs(sum(labels[i] == label for i in sample) - min(count, 200) * labels.count(label) / 200) < 1
    assert stratified_sample(labels, count, 5) == sample
    if count < 200:
        assert stratified_sample(labels, count, 6) != sample


def test_error_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*sst2/train\.jsonl"):
        task_rows(SST2, "train", tmp_path)


def test_errors_without_the_hub_name_the_options_for_local_data() -> None:
    with pytest.raises(DataError, match=r"from the hub: .*; to read local files, pass --data-dir"):
        task_rows(SST2, "validation", None)
    with pytest.raises(DataError, match=r"no calibration text found: pass --calibration FILE\.jsonl"):
        calibration_texts(None, None, 3)


def test_calibration_texts_are_read(write_jsonl: Callable[[str, list[str]], Path]) -> None:
    path = write_jsonl("c4_sample/train.jsonl", ['{"text": "a"}', '{"text": "b"}', '{"text": "c"}'])
    assert calibration_texts(None, path.parent.parent, 2) == (["a", "b"], "c4_sample/train.jsonl, first 2 texts")
    assert calibration_texts(path, None, 9)[0] == ["a", "b", "c"]
    bad = write_jsonl("bad.jsonl", ['{"content": "a"}'])
    with pytest.raises(DataError, match="needs the field 'text'"):
        calibration_texts(bad, None, 1)
    half = write_jsonl("half.jsonl", [r'{"text": "a \udc00"}'])
    with pytest.raises(DataError, match=r"half\.jsonl, line 1: field 'text' has half of a surrogate pair"):
        calibration_texts(half, None, 1)


@pytest.mark.parametrize("name", ["book.txt", "module.py", "README"])
def test_plain_calibration_text_is_cut_into_pieces_at_equal_distances(name: str, tmp_path: Path) -> None:
    lines = [f"line {i:04} " + "x" * 88 + "\n" for i in range(210)]  # of 99 characters: 21 in a piece
    (tmp_path / name).write_text("".join(lines))
    texts, description = calibration_texts(tmp_path / name, None, 4)
    assert description == f"{tmp_path.name}/{name}, 4 of 10 pieces of 2000 characters"
    assert texts == ["".join(lines[21 * i : 21 * (i + 1)]) for i in (0, 2, 5, 7)]
    assert len(calibration_texts(tmp_path / name, None, 64)[0]) == 10


def test_a_short_plain_text_is_one_piece_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a line\nand half of one")
    assert calibration_texts(tmp_path / "short.txt", None, 3)[0] == ["a line\nand half of one"]
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(DataError, match=r"empty\.txt has no texts"):
        calibration_texts(tmp_path / "empty.txt", None, 3)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt, line 1: byte 4 .* is not UTF-8"):
        calibration_texts(tmp_path / "latin.txt", None, 3)


def test_calibration_rows_are_read_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\none,1\ntwo,0\n")
    assert calibration_texts(tmp_path / "a.csv", None, 1)[0] == ["one"]
    (tmp_path / "lines").write_text('{"text": "one"}\n')  # JSON Lines under another name
    assert calibration_texts(tmp_path / "lines", None, 1)[0] == ["one"]


def test_token_batches_truncate_and_pad() -> None:
    batches = list(token_batches(["a fine film", "dull", "a film and a film"], make_tokenizer(WORDS), 2, 4))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 3), (1, 4)]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_rows_of_sst2_are_read(shared_data: Path) -> None:
    assert len(read_rows(shared_data / "sst2" / "validation.jsonl")) == 872
    rows = task_rows(SST2, "validation", shared_data)
    assert sum(row["label"] for row in rows) == 444


def test_rows_of_domains_are_interleaved(write_jsonl: Callable[[str, list[str]], Path]) -> None:
    for domain, count in {"amazon": 1, "movie": 3, "nyt": 2, "tweets": 2}.items():
        path = write_jsonl(
            f"vader_{domain}/train.jsonl", [f'{{"sentence": "{domain} {i}", "label": 1}}' for i in range(count)]
        )
    rows = task_rows(TASKS["vader"], "train", path.parent.parent)
    assert [row["sentence"] for row in rows] == [
        "amazon 0", "movie 0", "nyt 0", "tweets 0", "movie 1", "nyt 1", "tweets 1", "movie 2",
    ]  # fmt: skip
    assert [row["domain"] for row in rows[:4]] == ["amazon", "movie", "nyt", "tweets"]
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*vader_tweets/train\.jsonl"):
        task_rows(TASKS["vader"], "train", path.parent.parent)


def test_task_without_hub_source_asks_for_data_dir() -> None:
    with pytest.raises(DataError, match="the task 'vader' is not on the hub; read it from local files with --data-dir"):
        task_rows(TASKS["vader"], "train", None)


ON_THE_HUB = {name: task for name, task in TASKS.items() if task.hub is not None}
README = """configs:
- config_name: {config}
  data_files:
  - split: train
    path: part/train.parquet
  - split: {validation}
    path: part/{validation}.parquet
"""


@pytest.mark.parametrize("task", ON_THE_HUB.values(), ids=ON_THE_HUB)
def test_hub_and_data_directory_give_the_same_examples(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_jsonl: Callable[[str, list[str]], Path]
) -> None:
    """Stands in for the hub with a local directory: same layout, column names, split names and labels."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert task.hub is not None
    rows: list[dict[str, Any]] = [
        {name: f"{name} {i}" for name in task.fields} | {task.label: bool(i % 2) if task.name == "boolq" else i % 2}
        for i in range(6)
    ]
    splits = {"train": (rows[:4], "train"), "validation": (rows[4:], task.hub.validation)}
    folder = tmp_path / "hub" / "part"
    folder.mkdir(parents=True)
    for name, (rows_of_split, hub_split) in splits.items():
        write_jsonl(f"data/{task.name}/{name}.jsonl", [json.dumps(row) for row in rows_of_split])
        columns = {task.hub.columns.get(key, key): [row[key] for row in rows_of_split] for key in rows[0]}
        if task.name == "medical_abstracts":
            columns["condition_label"] = [label + 1 for label in columns["condition_label"]]
        pq.write_table(pa.table(columns | {"idx": list(range(len(rows_of_split)))}), folder / f"{hub_split}.parquet")
    readme = README.format(config=task.hub.config or "default", validation=task.hub.validation)
    (tmp_path / "hub" / "README.md").write_text(f"---\n{readme}---\n")
    task_with_local_hub = dataclasses.replace(task, hub=dataclasses.replace(task.hub, path=str(tmp_path / "hub")))
    for name, (rows_of_split, _) in splits.items():
        from_directory, from_hub = (
            EncodedTask(task, rows, make_byte_tokenizer(), 500, "test")
            for rows in (task_rows(task, name, tmp_path / "data"), task_rows(task_with_local_hub, name, None))
        )
        assert from_directory.prompts == from_hub.prompts
        assert (
            from_directory.labels.tolist()
            == from_hub.labels.tolist()
            == [int(row[task.label]) for row in rows_of_split]
        )


def test_load_dataset_is_called_with_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: calls.append((names, options)) or [])
    for name, split in (("trec", "validation"), ("rte", "train")):
        with pytest.raises(DataError, match="has no examples"):
            task_rows(TASKS[name], split, None)
    trec = {"split": "test", "revision": "refs/convert/parquet", "streaming": False}
    assert calls == [
        (("CogComp/trec", None), trec),
        (("aps/super_glue", "rte"), {"split": "train", "revision": None, "streaming": False}),
    ]


def test_hub_source_reads_json_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_jsonl: Callable[[str, list[str]], Path]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl("hub/train.jsonl", ['{"text": "a", "label": 3}'])
    task = TASKS["ag_news"]
    assert task.hub is not None
    task_with_local_hub = dataclasses.replace(task, hub=dataclasses.replace(task.hub, path=str(tmp_path / "hub")))
    assert task_rows(task_with_local_hub, "train", None).rows == [{"text": "a", "label": 3}]
    with pytest.raises(DataError, match=r"cannot load .*hub from the hub: .*; to read local files, pass --data-dir"):
        task_rows(task_with_local_hub, "validation", None)


MAIL = custom_task("mail", "{text} This is", "spam,fine")


def test_a_fifth_of_custom_data_is_held_out(write_jsonl: Callable[[str, list[str]], Path]) -> None:
    path = write_jsonl("mail.jsonl", [json.dumps({"text": str(i), "label": i % 2}) for i in range(52)])
    train, held = custom_rows(MAIL, path, None, 3)
    assert (len(train), len(held)) == (42, 10)
    texts = [int(row["text"]) for row in train]
    assert texts == sorted(texts)
    assert sorted(texts + [int(row["text"]) for row in held]) == list(range(52))
    assert custom_rows(MAIL, path, None, 3) == (train, held)
    assert custom_rows(MAIL, path, None, 4) != (train, held)


def test_validation_file_is_used_unchanged(write_jsonl: Callable[[str, list[str]], Path]) -> None:
    data = write_jsonl("mail.jsonl", ['{"text": "a", "label": "spam"}'])
    validation = write_jsonl("other.jsonl", ['{"text": "b", "label": "fine"}'])
    train, held = custom_rows(MAIL, data, validation, 0)
    assert [row["text"] for row in (*train, *held)] == ["a", "b"]
    with pytest.raises(DataError, match=r"mail\.jsonl has only one example, so none can be held out"):
        custom_rows(MAIL, data, None, 0)


def test_custom_data_without_a_field_of_the_template_raise(write_jsonl: Callable[[str, list[str]], Path]) -> None:
    path = write_jsonl("mail.jsonl", ['{"text": "a", "label": 0}', '{"body": "a", "label": 0}'])
    message = r"mail\.jsonl, line 2: task 'mail' needs the field 'text'; found \['body', 'label'\]"
    with pytest.raises(DataError, match=message):
        custom_rows(MAIL, path, None, 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_scripted_data_set_is_not_run(tmp_path: Path, streaming: bool) -> None:
    directory = tmp_path / "scripted"
    directory.mkdir()
    (directory / "scripted.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'proof')!r}).touch()\n")
    with pytest.raises(
        DataError, match=r"cannot load .*scripted from the hub: Dataset scripts are no longer supported"
    ):
        next(HubSource(path=str(directory)).rows("train", streaming=streaming))
    assert not (tmp_path / "proof").exists()
