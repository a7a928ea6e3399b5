"""The embedded default: a small model this project trained itself and tasks for it; no network, no downloads."""

from functools import cache
from pathlib import Path

import torch

from ..models import LanguageModel, load_model
from ..tasks import Row
from . import corpus

NAME = "embedded"
TASKS = {task.name: task for task in (corpus.TASK, corpus.TOPIC)}
_SEED = 1
_DIRECTORY = Path(__file__).parent / "model"
_TRAIN, _VALIDATION = 800, 400


def load(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> LanguageModel:
    """The embedded model: Llama architecture, two layers of width 64."""
    return load_model(str(_DIRECTORY), dtype, device)


@cache
def rows(split: str, task: str = NAME) -> tuple[Row, ...]:
    """Examples of an embedded task; the validation reviews are none of the training ones."""
    make = corpus.rows if task == NAME else corpus.topic_rows
    if split == "train":
        return tuple(make(_TRAIN, _SEED))
    seen = frozenset(str(row["review"]) for row in rows("train", task))
    return tuple(make(_VALIDATION, _SEED + 1, seen))


def calibration_texts(count: int) -> tuple[list[str], str]:
    """Pre-training text that the model has not seen."""
    return corpus.texts(count, _SEED + 2), f"embedded corpus, {count} texts"


__all__ = ["NAME", "TASKS", "calibration_texts", "load", "rows"]
