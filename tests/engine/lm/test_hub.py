"""Data sets on the hub by the user's own names: of the data set, its configuration, its splits and its revision."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meerkat_engine.engine.errors import DataError
from meerkat_engine.engine.lm.hub import HubSource

from helpers.hub import COMMIT, hub_server

README = """---
configs:
- config_name: short
  data_files:
  - split: train
    path: part/train.parquet
  - split: dev
    path: part/dev.parquet
- config_name: long
  data_files:
  - split: train
    path: part/dev.parquet
---
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the layout of a data set on the hub: two configurations, one of which has a held-out split."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_data_set(tmp_path / "data")


def write_data_set(directory: Path) -> Path:
    (directory / "part").mkdir(parents=True)
    (directory / "README.md").write_text(README)
    for name in ("train", "dev"):
        table = pa.table({"prompt": [f"{name} {i}" for i in range(10)], "turns": [[{"role": "user"}]] * 10})
        pq.write_table(table, directory / "part" / f"{name}.parquet")
    return directory


def prompts(split: str = "train", streaming: bool = False, **names: Any) -> list[str]:
    return [row["prompt"] for row in HubSource(**names).rows(split, streaming=streaming)]


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_have_the_names_that_the_user_gives(streaming: bool, directory: Path) -> None:
    names = {"path": str(directory), "config": "short", "train": "dev", "validation": "train"}
    assert prompts("train", streaming, **names)[:2] == ["dev 0", "dev 1"]
    assert prompts("validation", streaming, **names)[:2] == ["train 0", "train 1"]
    (row, *_) = HubSource(path=str(directory), config="short").rows("train", streaming=streaming)
    assert row["turns"] == [{"role": "user"}]


def test_a_part_of_a_split_has_the_notation_of_datasets(directory: Path) -> None:
    assert prompts(path=str(directory), config="short", train="train[8:]+dev[:1]") == ["train 8", "train 9", "dev 0"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        ({}, "train", "it has several configurations, of which one must be named: short, long"),
        ({"config": "wide"}, "train", "it has no configuration 'wide', but has short, long"),
        ({"config": "short", "train": "test"}, "train", "it has no split 'test', but has train, dev"),
        ({"config": "short", "validation": "test"}, "validation", "it has no split 'test', but has train, dev"),
        ({"config": "short", "train": "a b"}, "train", "it has no split 'a b', but has train, dev"),
        ({"config": "long"}, "validation", "it has no split 'validation', but has train"),
        ({"config": "short", "validation": None}, "validation", r"data \(short\) has no held-out split; name one"),
    ],
)
def test_a_name_that_does_not_exist_is_named_with_those_that_do(
    names: dict[str, Any], split: str, message: str, streaming: bool, directory: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prompts(split, streaming, path=str(directory), **names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["json", "text", "csv", "hf://datasets/json"])
def test_the_name_of_a_file_format_does_not_read_the_working_directory(
    name: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    for ending in ("json", "txt", "csv"):
        Path(f"own.{ending}").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=f"^{name} is a file format of `datasets`, not a data set; use --data FILE"):
        prompts("train", streaming, path=name)


def test_a_directory_with_the_name_of_a_file_format_is_read_as_a_path(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory.rename(directory.with_name("csv")).parent)
    with pytest.raises(DataError, match=r"use --data FILE for a file, or --dataset \./csv for the directory"):
        prompts(path="csv", config="short")
    assert prompts(path="./csv", config="short")[:2] == ["train 0", "train 1"]


def test_a_data_set_whose_card_names_files_of_this_machine_is_rejected(tmp_path: Path) -> None:
    """The node of a federation may load data sets that the server chose."""
    (tmp_path / "own.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "data").mkdir()
    card = README.replace("part/train.parquet", str(tmp_path / "own.jsonl"))
    (tmp_path / "data" / "README.md").write_text(card)
    with hub_server({"datasets/me/data": tmp_path / "data"}) as server:
        (message,) = load(tmp_path / "home", server.url, "me/data,short,main")
    assert message.startswith("cannot load me/data (short) @ main from the hub: "), message


def test_damaged_files_are_one_error_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": }\n')
    with pytest.raises(DataError, match=r"cannot load .*data from the hub: .*JSON parse error") as caught:
        prompts(path=str(tmp_path / "data"))
    assert "\n" not in str(caught.value)


LOAD = """
import sys
from meerkat_engine import MeerkatError
from meerkat_engine.engine.lm.hub import HubSource
for path, config, revision in (words.split(",") for words in sys.argv[1:]):
    try:
        print(len(list(HubSource(path=path, config=config, revision=revision).rows("train"))))
    except MeerkatError as error:
        print(error)
"""


def load(home: Path, url: str, *words: str) -> list[str]:
    """Loads data sets, each given as name, configuration and revision, in a process of its own: what was printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": url}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *words], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_names_on_a_hub_and_in_its_cache(tmp_path: Path) -> None:
    with hub_server({"datasets/me/data": write_data_set(tmp_path / "data")}) as server:
        url = server.url
        found, commit, revision, name, config = load(
            tmp_path / "home", url, "me/data,short,main", f"me/data,short,{COMMIT}", "me/data,short,v2",
            "me/other,short,main", "me/data,wide,main",
        )  # fmt: skip
    assert found == commit == "10"
    assert "cannot load me/data (short) @ v2 from the hub: Revision 'v2' doesn't exist for dataset 'me" in revision
    assert "cannot load me/other (short) @ main from the hub: Dataset 'me/other' doesn't exist on the Hub" in name
    assert "cannot load me/data (wide) @ main from the hub: it has no configuration 'wide', but has short" in config
    found, commit, revision, other = load(
        tmp_path / "home", url, "me/data,short,main", f"me/data,short,{COMMIT}", "me/data,short,v2",
        f"me/data,short,{COMMIT[::-1]}",
    )  # fmt: skip
    assert found == commit == "10"
    assert "@ v2 is not in the cache (the cache has another revision than 'v2')" in revision
    assert "is not in the cache (the cache has another revision than" in other
