"""Synthetic reviews: pre-training text of the embedded model, and the tasks that it is fine-tuned for.

A review consists of a few clauses that praise or criticize, some of them by negation, and some neutral ones. A
pre-training text is a review with a closing remark of the same sentiment. The task asks for the sentiment with words
that pre-training text uses only in other contexts. So the pre-trained model represents the sentiment of a review, but
does not know how the task asks for it.
"""

from collections.abc import Sequence

import torch

from ... import stream
from ..tasks import Task

TASK = Task(
    name="embedded",
    template="{review} so my answer is",
    cut="review",
    label_words=(" no", " yes"),
)

_THINGS = {
    "film": ("plot", "cast", "music", "ending", "script", "camera work"),
    "book": ("story", "prose", "cover", "ending", "dialogue", "first chapter"),
    "meal": ("soup", "service", "dessert", "wine", "bread", "main course"),
    "hotel": ("room", "breakfast", "staff", "view", "bed", "front desk"),
    "phone": ("screen", "battery", "sound", "camera", "price", "case"),
    "game": ("story", "controls", "music", "level design", "ending", "art"),
}
# Asks what the same kind of review is about.
TOPIC = Task(
    name="embedded-topic",
    template="{review} this was about a",
    cut="review",
    label_words=tuple(f" {thing}" for thing in _THINGS),
)

_GOOD = (
    "great", "lovely", "superb", "charming", "brilliant", "delightful",
    "excellent", "clever", "warm", "fresh", "gripping", "perfect",
)  # fmt: skip
_BAD = (
    "awful", "dull", "dreadful", "clumsy", "terrible", "boring",
    "poor", "stale", "cold", "lazy", "tedious", "broken",
)  # fmt: skip
_DEGREES = ("", "", "really", "rather", "quite", "so")
_OPENINGS = ("the {} was", "its {} is", "i found the {}", "everyone said the {} was", "we thought the {} was")
_NEUTRAL = (
    "i tried this {} on a monday",
    "a friend told me about this {}",
    "this {} came in a blue box",
    "we went with the children",
    "it took about two hours",
    "the {} was recommended online",
)
_PRAISE = (
    "i would gladly do it again",
    "i loved it",
    "you should try this {}",
    "worth every penny",
    "it made my day",
    "i am very happy with it",
)
_BLAME = (
    "i want my money back",
    "i hated it",
    "you should avoid this {}",
    "a waste of time",
    "it ruined my day",
    "i am very sorry i bought it",
)
# The only pre-training texts with the task's label words. They contain no review, so the label words in them do not
# depend on one.
_CHATTER = (
    "is it raining ? {}",
    "did the train stop here ? {}",
    "my answer is {} , said the clerk",
    "so , {} , the shop is open on sunday",
    "was the box blue ? {}",
    "{} , that is my number",
)


class Draws:
    """Random choices from the project's stream, which are the same on every machine and with every version."""

    def __init__(self, seed: int) -> None:
        self._seed, self._block, self._words = seed, 0, list[int]()

    def below(self, n: int) -> int:
        """Draws an integer in [0, n)."""
        if not self._words:
            ids = torch.arange(self._block, self._block + 64, dtype=torch.int64, device="cpu")
            self._words = stream.bits(self._seed, ids).view(-1).tolist()
            self._block += 64
        return self._words.pop() * n >> 32

    def one_of(self, choices: Sequence[str]) -> str:
        """Draws one of the choices."""
        return choices[self.below(len(choices))]


def _clause(draws: Draws, thing: str, good: bool) -> str:
    """Draws a clause about a part of ``thing`` that praises (``good``) or criticizes."""
    negated = draws.below(4) == 0
    words = [draws.one_of(_OPENINGS).format(draws.one_of(_THINGS[thing]))]
    words.append("not" if negated else draws.one_of(_DEGREES))
    words.append(draws.one_of(_GOOD if good != negated else _BAD))
    return " ".join(word for word in words if word)


def draw_review(draws: Draws, good: bool) -> tuple[str, str]:
    """Draws a review that praises (``good``) or criticizes; returns it and the thing it is about.

    The review does not always name the thing.
    """
    thing = draws.one_of(tuple(_THINGS))
    clauses = [_clause(draws, thing, good) for _ in range(1 + draws.below(3))]
    for _ in range(draws.below(3)):
        clauses.insert(draws.below(len(clauses) + 1), draws.one_of(_NEUTRAL).format(thing))
    if draws.below(5) == 0:  # one clause of the opposite sentiment
        clauses.insert(0, _clause(draws, thing, not good) + " but")
    return " . ".join(clauses).replace("but .", "but") + " .", thing


def texts(count: int, seed: int) -> list[str]:
    """Generates ``count`` pre-training documents from a seed in [0, 2**64)."""
    draws = Draws(stream.derived_seed(seed, "text"))
    documents = []
    for _ in range(count):
        if draws.below(4) == 0:
            documents.append(
                " . ".join(draws.one_of(_CHATTER).format(draws.one_of(("yes", "no"))) for _ in range(3)) + " ."
            )
            continue
        good = draws.below(2) == 1
        review, thing = draw_review(draws, good)
        documents.append(f"{review} {draws.one_of(_PRAISE if good else _BLAME).format(thing)} .")
    return documents


def rows(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[dict[str, str | int]]:
    """Generates examples of ``TASK``: distinct reviews, positive and negative ones in turn.

    Args:
        count: number of examples.
        seed: seed of the reviews, in [0, 2**64).
        exclude: reviews to leave out.
    """
    draws = Draws(stream.derived_seed(seed, "rows"))
    label_of: dict[str, int] = {}
    while len(label_of) < count:
        label = len(label_of) % 2
        review, _ = draw_review(draws, label == 1)
        if review not in exclude:
            label_of.setdefault(review, label)
    return [{"review": review, "label": label} for review, label in label_of.items()]


def topic_rows(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[dict[str, str | int]]:
    """Generates examples of ``TOPIC``: distinct reviews. See ``rows`` for the arguments."""
    draws, things = Draws(stream.derived_seed(seed, "topi")), tuple(_THINGS)
    label_of: dict[str, int] = {}
    while len(label_of) < count:
        review, thing = draw_review(draws, draws.below(2) == 1)
        if review not in exclude:
            label_of.setdefault(review, things.index(thing))
    return [{"review": review, "label": label} for review, label in label_of.items()]


def vocabulary() -> list[str]:
    """Returns all words that can occur in generated text and prompts, sorted."""
    patterns = [*_OPENINGS, *_NEUTRAL, *_PRAISE, *_BLAME, *_CHATTER, *_DEGREES, *_GOOD, *_BAD, *_THINGS, TASK.template]
    patterns += [part for parts in _THINGS.values() for part in parts]
    patterns += [*TASK.label_words, "not but . ,"]
    return sorted({word for pattern in patterns for word in pattern.split() if "{" not in word})


__all__ = ["TASK", "TOPIC", "Draws", "draw_review", "rows", "texts", "topic_rows", "vocabulary"]
