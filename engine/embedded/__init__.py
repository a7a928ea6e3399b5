"""The embedded default: a small model this project trained itself and a task for it; no network, no downloads."""

from functools import cache
from pathlib import Path

import torch

from ..models import LanguageModel, load_model
from ..tasks import Row
from . import corpus
from .corpus import TASK

NAME = "embedded"
_SEED = 1
_DIRECTORY = Path(__file__).parent / "model"
_TRAIN, _VALIDATION = 800, 400


def load(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> LanguageModel:
    """The embedded model: Llama architecture, two layers of width 64."""
    return load_model(str(_DIRECTORY), dtype, device)


@cache
def rows(split: str) -> tuple[Row, ...]:
    """Examples of the embedded task; the validation reviews are none of the training ones."""
    if split == "train":
        return tuple(corpus.rows(_TRAIN, _SEED))
    seen = frozenset(str(row["review"]) for row in rows("train"))
    return tuple(corpus.rows(_VALIDATION, _SEED + 1, seen))


def calibration_texts(count: int) -> tuple[list[str], str]:
    """Pre-training text that the model has not seen."""
    return corpus.texts(count, _SEED + 2), f"embedded corpus, {count} texts"


__all__ = ["NAME", "TASK", "calibration_texts", "load", "rows"]
