"""Rows of a task and calibration text: JSON Lines on disk, or the hub's copy."""

import json
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import stream
from ..errors import DataError
from .hub import HubSource
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
        data_dir: holds TASK/SPLIT.jsonl, or TASK_DOMAIN/SPLIT.jsonl for each domain; None loads the hub's copy.

    Returns:
        The rows as they come; those of several domains in turn, so that the first ones hold something of each.

    Raises:
        DataError: if they cannot be had, or a row (named) does not fit the task.
    """
    if data_dir is None:
        if task.hub is None:
            raise DataError(f"the task {task.name!r} is not on the hub; give --data-dir")
        return _checked(task, task.hub.rows(split), f"{task.hub}, {split}")
    if not task.domains:
        return _from_file(task, data_dir / task.name / f"{split}.jsonl")
    parts = [
        [{**row, "domain": domain} for row in _from_file(task, data_dir / f"{task.name}_{domain}" / f"{split}.jsonl")]
        for domain in task.domains
    ]
    return [row for turn in zip_longest(*parts) for row in turn if row is not None]


def custom_rows(task: Task, data: Path, validation: Path | None, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and validation rows from files of the user's own.

    Args:
        task: made for them; see ``tasks.own_task``.
        data: JSON Lines.
        validation: JSON Lines; None holds out a fifth of the data.
        seed: chooses that fifth, in [0, 2**64).

    Raises:
        DataError: if a file cannot be read, a row (named) does not fit the task, or there is nothing to hold out.
    """
    rows = _from_file(task, data)
    if validation is not None:
        return rows, _from_file(task, validation)
    if len(rows) < 2:
        raise DataError(f"{data} holds one example, of which none can be held out; give more, or --validation")
    order = stream.permutation(stream.derived_seed(seed, "held"), len(rows)).tolist()
    held = order[: max(1, len(rows) // 5)]
    left = sorted(order[len(held) :])
    return [rows[i] for i in left], [rows[i] for i in held]


def _checked(task: Task, rows: Iterable[Row], where: str) -> list[Row]:
    """The rows as a list; raises ``DataError`` if there are none, or one of them does not fit the task."""
    found = []
    for number, row in enumerate(rows, 1):
        task.check(row, f"{where}, example {number}")
        found.append(row)
    if not found:
        raise DataError(f"{where} holds no examples")
    return found


def _from_file(task: Task, path: Path) -> list[Row]:
    return _checked(task, read_jsonl(path), str(path))


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
            stream = HubSource(path="allenai/c4", config="en").rows("train", streaming=True)
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


__all__ = ["calibration_texts", "custom_rows", "read_jsonl", "task_rows", "token_batches"]
