"""Examples of a task, encoded by a tokenizer of one token a word."""

from typing import Any

import torch

from meerkat_engine.examples import EncodedTask
from meerkat_engine.tasks import SST2, Task
from tests.conftest import make_tokenizer

ROWS = [
    {"sentence": "a fine film ", "label": 1},
    {"sentence": "dull", "label": 0},
    {"sentence": "not a fine and funny film at all", "label": 0},
]
WORDS = "a fine film dull not and funny at all It was terrible great so good indeed"
LONG = Task(name="long", template="{sentence} It was", cut="sentence", label_words=(" terrible", " so good indeed"))
CPU = torch.device("cpu")


def encoded(task: Task = SST2, max_length: int = 32, rows: list[dict[str, Any]] = ROWS) -> EncodedTask:
    return EncodedTask(task, rows, make_tokenizer(WORDS), max_length, "test")
