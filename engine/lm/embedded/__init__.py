"""The embedded model, a small one that this project trained itself, with its tasks. Needs no network."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..models import LanguageModel, load_model
from ..tasks import Row
from . import corpus

NAME = "embedded"
TASKS = {task.name: task for task in (corpus.TASK, corpus.TOPIC)}
_SEED = 1
DIRECTORY = Path(__file__).parent / "model"
_TRAIN, _VALIDATION = 800, 400


def load(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **options: Any) -> LanguageModel:
    """Loads the embedded model: Llama architecture, two layers of width 64.

    Args:
        dtype: dtype of the weights.
        device: device to put the model on.
        options: further options of ``models.load_model``.
    """
    return load_model(str(DIRECTORY), dtype, device, **options)


@cache
def rows(split: str, task: str = NAME) -> tuple[Row, ...]:
    """Returns the examples of an embedded task. No review is in both splits.

    Args:
        split: "train" (800 examples) or "validation" (400 examples).
        task: name of the task, a key of ``TASKS``.
    """
    generate = corpus.rows if task == NAME else corpus.topic_rows
    if split == "train":
        return tuple(generate(_TRAIN, _SEED))
    training_reviews = frozenset(str(row["review"]) for row in rows("train", task))
    return tuple(generate(_VALIDATION, _SEED + 1, training_reviews))


def calibration_texts(count: int) -> tuple[list[str], str]:
    """Returns ``count`` pre-training texts that the model was not trained on, and a description of their source."""
    return corpus.texts(count, _SEED + 2), f"embedded corpus, {count} texts"


__all__ = ["DIRECTORY", "NAME", "TASKS", "calibration_texts", "load", "rows"]
