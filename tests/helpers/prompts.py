"""Small sets of examples, tokenized with one token per word."""

from typing import Any

from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.tasks import SST2, Task

from helpers.models import make_tokenizer

ROWS = [
    {"sentence": "a fine film ", "label": 1},
    {"sentence": "dull", "label": 0},
    {"sentence": "not a fine and funny film at all", "label": 0},
]
_LINES = [
    "a fine film",
    "dull",
    "not a fine and funny film at all",
    "funny",
    "a dull film and not funny",
    "fine",
    "not so",
]
SEVEN_ROWS = [{"sentence": line, "label": i % 2} for i, line in enumerate(_LINES)]
WORDS = "a fine film dull not and funny at all It was terrible great so good indeed"
MULTI_TOKEN_TASK = Task(
    name="long", template="{sentence} It was", cut="sentence", label_words=(" terrible", " so good indeed")
)


def encode_task(task: Task = SST2, max_length: int = 32, rows: list[dict[str, Any]] = ROWS) -> EncodedTask:
    """Tokenizes rows of a task; ``max_length`` counts the tokens of prompt and answer."""
    return EncodedTask(task, rows, make_tokenizer(WORDS), max_length, "test")
