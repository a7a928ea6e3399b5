"""Rows of a task and calibration text: JSON Lines on disk, or the hub's copy through ``datasets``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import DataError
from .tasks import Row, Task


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file.

    Raises:
        DataError: if the file cannot be read, or a line (named) is not a JSON object.
    """
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
                rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return rows


def task_rows(task: Task, split: str, data_dir: Path | None) -> list[Row]:
    """The rows of a task's split, checked against the task.

    Args:
        task: which task.
        split: "train" or "validation".
        data_dir: holds TASK/SPLIT.jsonl; None loads the hub's copy.

    Raises:
        DataError: if they cannot be had, or a row (named) does not fit the task.
    """
    rows: list[Row]
    if data_dir is not None:
        where = data_dir / task.name / f"{split}.jsonl"
        rows = list(read_jsonl(where))
    else:
        where = Path("/".join((*task.hub, split)))
        rows = list(_from_hub(task.hub, split))
    if not rows:
        raise DataError(f"{where} holds no examples")
    for number, row in enumerate(rows, 1):
        task.check(row, f"{where}, example {number}")
    return rows


def calibration_texts(path: Path | None, data_dir: Path | None, count: int) -> tuple[list[str], str]:
    """Pre-training text for the mask, and where it came from.

    Args:
        path: JSON Lines with the field ``text``; None looks for DATA_DIR/c4_sample/train.jsonl, then the hub's C4.
        data_dir: see ``task_rows``.
        count: texts wanted.

    Raises:
        DataError: if there is none to be had, saying what to give.
    """
    if path is None and data_dir is not None and (data_dir / "c4_sample" / "train.jsonl").is_file():
        path = data_dir / "c4_sample" / "train.jsonl"
    if path is None:
        try:
            stream = _from_hub(("allenai/c4", "en"), "train", streaming=True)
            return [row["text"] for row, _ in zip(stream, range(count), strict=False)], "C4 (hub), first documents"
        except DataError as error:
            raise DataError(
                f"no calibration text: give --calibration FILE.jsonl (field text), or --mask FILE, or a --data-dir "
                f"with c4_sample/train.jsonl ({error})"
            ) from error
    texts = []
    for number, row in enumerate(read_jsonl(path)[:count], 1):
        if not isinstance(row.get("text"), str):
            raise DataError(f"{path}, example {number}: calibration text needs the field 'text'; found {sorted(row)}")
        texts.append(row["text"])
    if not texts:
        raise DataError(f"{path} holds no text")
    return texts, f"{path.parent.name}/{path.name}, first {len(texts)} texts"


def token_batches(texts: list[str], tokenizer: Any, batch_size: int, length: int) -> Iterator[dict[str, Tensor]]:
    """Texts as padded batches for the language-model loss: ``input_ids`` and ``attention_mask`` [B, <= length]."""
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer(
            texts[start : start + batch_size], truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        batch = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if int((batch["attention_mask"].sum(1) > 1).sum()):  # one token has no next one to predict
            yield batch


def _from_hub(name: tuple[str, ...], split: str, streaming: bool = False) -> Iterator[dict[str, Any]]:
    if not name:
        raise DataError("this data set is not on the hub; give --data-dir")
    import datasets

    try:
        rows = datasets.load_dataset(*name, split=split, streaming=streaming)
        yield from rows
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load {'/'.join(name)} from the hub: {error}; give --data-dir for local files"
        ) from error


__all__ = ["calibration_texts", "read_jsonl", "task_rows", "token_batches"]
