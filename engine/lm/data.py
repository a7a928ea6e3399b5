"""Reads the examples of tasks and calibration text, from files or the Hugging Face hub."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import stream
from ..errors import DataError
from .free_text.task import TextTask
from .hub import HubSource
from .row_files import LocatedRows, is_plain_text, read_rows
from .tasks import Task
from .text import check_text
from .text_lines import decoded_lines, read_content

# Length of a piece of a plain file, in characters: 256 tokens of prose or code, the default length of a text, or more.
_PIECE = 2000

AnyTask = Task | TextTask


def task_rows(task: AnyTask, split: str, data_dir: Path | None) -> LocatedRows:
    """Reads the rows of a task's split and checks that they fit the task.

    Args:
        task: the task.
        split: "train" or "validation".
        data_dir: directory with TASK/SPLIT.jsonl, or with TASK_DOMAIN/SPLIT.jsonl for each domain; None loads the split
            from the hub.

    Returns:
        The rows in the order of the data. Rows of several domains are interleaved, so that the first rows include some
        of each domain.

    Raises:
        DataError: if the rows cannot be read, or a row does not fit the task; the message names the row.
    """
    if data_dir is None:
        if task.hub is None:
            raise DataError(f"the task {task.name!r} is not on the hub; read it from local files with --data-dir")
        return hub_rows(task, task.hub, split)
    if not task.domains:
        return file_rows(task, data_dir / task.name / f"{split}.jsonl")
    by_domain = []
    for domain in task.domains:
        located = file_rows(task, data_dir / f"{task.name}_{domain}" / f"{split}.jsonl")
        by_domain.append(
            [({**row, "domain": domain}, where) for row, where in zip(located, located.places, strict=True)]
        )
    interleaved = [pair for one_per_domain in zip_longest(*by_domain) for pair in one_per_domain if pair is not None]
    return LocatedRows([row for row, _ in interleaved], [where for _, where in interleaved])


def task_splits(task: AnyTask, data_dir: Path | None, seed: int) -> tuple[LocatedRows, LocatedRows]:
    """Reads training and validation rows of a task. Where the hub has no validation split, a fifth is held out.

    Args:
        task: the task.
        data_dir: see ``task_rows``.
        seed: see ``hold_out``.

    Raises:
        DataError: see ``task_rows``.
    """
    train = task_rows(task, "train", data_dir)
    if data_dir is None and task.hub is not None and task.hub.validation is None:
        return hold_out(train, seed, str(task.hub))
    return train, task_rows(task, "validation", data_dir)


def custom_rows(task: AnyTask, data: Path, validation: Path | None, seed: int) -> tuple[LocatedRows, LocatedRows]:
    """Reads training and validation rows from the user's own files.

    Args:
        task: task made for these data.
        data: file with the rows; see ``row_files.read_rows``.
        validation: file with the validation rows; None holds out a fifth of ``data``.
        seed: see ``hold_out``.

    Returns:
        Training rows and validation rows.

    Raises:
        DataError: if a file cannot be read, a row does not fit the task (the message names the row), or there are too
            few rows to hold one out.
    """
    rows = file_rows(task, data)
    return (rows, file_rows(task, validation)) if validation is not None else hold_out(rows, seed, str(data))


def hold_out(rows: LocatedRows, seed: int, where: str) -> tuple[LocatedRows, LocatedRows]:
    """Divides rows into training rows and a fifth that is held out.

    Args:
        rows: the rows.
        seed: seed of the choice of that fifth, in [0, 2**64).
        where: source of the rows, for messages.

    Raises:
        DataError: if there is only one row.
    """
    if len(rows) < 2:
        raise DataError(
            f"{where} has only one example, so none can be held out; add examples, or pass --validation FILE"
        )
    order = stream.permutation(stream.derived_seed(seed, "held"), len(rows)).tolist()
    held_out = order[: max(1, len(rows) // 5)]
    return rows.select(sorted(order[len(held_out) :])), rows.select(held_out)


def hub_rows(task: AnyTask, hub: HubSource, split: str) -> LocatedRows:
    """Reads the rows of a split on the hub, or of a local directory like one, and checks that they fit a task.

    Raises:
        DataError: see ``task_rows``.
    """
    rows = list(hub.rows(split))
    return _checked(
        task, LocatedRows(rows, [f"{hub}, {split}, example {i}" for i in range(1, len(rows) + 1)]), str(hub)
    )


def file_rows(task: AnyTask, path: Path) -> LocatedRows:
    """Reads the rows of a file and checks that they fit a task; see ``task_rows``."""
    return _checked(task, read_rows(path), str(path))


def _checked(task: AnyTask, rows: LocatedRows, where: str) -> LocatedRows:
    """Returns the rows. Those of free text are checked when they are rendered.

    Raises:
        DataError: if there are no rows, or a row does not fit the task.
    """
    if not len(rows):
        raise DataError(f"{where} has no examples")
    if isinstance(task, Task):
        for row, place in zip(rows, rows.places, strict=True):
            task.check(row, place)
    return rows


def stratified_sample(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Draws examples at random, from each class as many as its share of all examples, rounded up or down.

    Args:
        labels: class of each example.
        count: number of examples to draw, at most all.
        seed: seed of the draw, in [0, 2**64).

    Returns:
        Ascending indices.
    """
    members: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for i, label in enumerate(labels):
        members[label].append(i)
    count = min(count, len(labels))
    # Each class gets its share rounded down; what remains goes to the largest remainders.
    shares = {label: divmod(count * len(of_class), len(labels)) for label, of_class in members.items()}
    rest = count - sum(whole for whole, _ in shares.values())
    rounded_up = sorted(shares, key=lambda label: -shares[label][1])[:rest]
    chosen: list[int] = []
    for label, of_class in members.items():
        order = stream.permutation(stream.derived_seed(seed, "eval", label), len(of_class)).tolist()
        chosen += [of_class[i] for i in order[: shares[label][0] + (label in rounded_up)]]
    return sorted(chosen)


def calibration_file(path: Path | None, data_dir: Path | None) -> Path | None:
    """The file that ``calibration_texts`` reads; None: it reads C4 on the hub."""
    sample = None if data_dir is None else data_dir / "c4_sample" / "train.jsonl"
    return sample if path is None and sample is not None and sample.is_file() else path


def calibration_texts(path: Path | None, data_dir: Path | None, count: int) -> tuple[list[str], str]:
    """Reads pre-training text for the mask.

    Args:
        path: file whose rows have the field ``text``, in a format of ``row_files``, or a file of plain text, code for
            example, which is cut into pieces; None looks for DATA_DIR/c4_sample/train.jsonl, then for C4 on the hub.
        data_dir: see ``task_rows``.
        count: maximum number of texts: the first rows, or pieces at equal distances.

    Returns:
        The texts, and a description of their source.

    Raises:
        DataError: if there is no text; the message names the options that provide some.
    """
    path = calibration_file(path, data_dir)
    if path is None:
        try:
            documents = HubSource(path="allenai/c4", config="en").rows("train", streaming=True)
            return [row["text"] for row, _ in zip(documents, range(count), strict=False)], "C4 (hub), first documents"
        except DataError as error:
            raise DataError(
                f"no calibration text found: pass --calibration FILE.jsonl (with the field text), a --data-dir with "
                f"c4_sample/train.jsonl, or an existing mask with --mask FILE ({error})"
            ) from error
    name = f"{path.parent.name}/{path.name}"
    if is_plain_text(path):
        pieces = _pieces(path)
        chosen = [pieces[i * len(pieces) // count] for i in range(count)] if len(pieces) > count else pieces
        return chosen, f"{name}, {len(chosen)} of {len(pieces)} pieces of {_PIECE} characters"
    texts = _texts_of_rows(path, count)
    return texts, f"{name}, first {len(texts)} texts"


def _texts_of_rows(path: Path, count: int) -> list[str]:
    """The field ``text`` of the first rows of a file."""
    texts = []
    located = read_rows(path)
    for row, place in zip(located.rows[:count], located.places, strict=False):
        if not isinstance(row.get("text"), str):
            raise DataError(f"{place}: calibration text needs the field 'text'; found {sorted(row)}")
        check_text(row["text"], f"{place}: field 'text'")
        texts.append(row["text"])
    return texts


def _pieces(path: Path) -> list[str]:
    """Cuts a file of plain text, at ends of lines, into pieces of ``_PIECE`` characters or a line more."""
    pieces, lines, length = [], list[str](), 0
    for _, line in decoded_lines(read_content(path), path):
        lines.append(line)
        length += len(line)
        if length >= _PIECE:
            pieces.append("".join(lines))
            lines, length = [], 0
    rest = "".join(lines)
    if rest.strip() and not pieces:
        pieces = [rest]
    if not pieces:
        raise DataError(f"{path} has no texts")
    return pieces


def token_batches(texts: list[str], tokenizer: Any, batch_size: int, length: int) -> Iterator[dict[str, Tensor]]:
    """Yields tokenized texts in padded batches for the language-model loss.

    A batch in which no text has two tokens is left out: there is no next token to predict.

    Args:
        texts: the texts.
        tokenizer: the model's tokenizer.
        batch_size: number of texts per batch.
        length: maximum number of tokens of a text; the rest is cut.

    Yields:
        ``input_ids`` and ``attention_mask``, both int64 [B, L] with L at most ``length``.
    """
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer(
            texts[start : start + batch_size], truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        batch = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if int((batch["attention_mask"].sum(1) > 1).sum()):
            yield batch


__all__ = [
    "AnyTask",
    "calibration_file",
    "calibration_texts",
    "custom_rows",
    "file_rows",
    "hold_out",
    "hub_rows",
    "stratified_sample",
    "task_rows",
    "task_splits",
    "token_batches",
]
