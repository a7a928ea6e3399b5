"""``SCORES``: the numbers that an evaluation can have, and how they are shown. They are listed only here.

A line of the metrics has them under these names, and a summary under NAME_before and NAME_after.
"""

import math
from collections.abc import Container
from dataclasses import dataclass

LOSS = "validation_loss"
_LARGE = 1e6  # decimals of larger numbers say nothing
_CLASSIFICATION = ("accuracy", "macro_f1")
_FREE_TEXT = "perplexity"


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a score is shown.

    Args:
        title: its name for people.
        hub_type: its name on the Hugging Face hub, for model cards.
        higher_is_better: whether a better model has a higher score.
        decimals: number of decimals shown.
        generated: whether it compares generated text.
        may_be_null: whether its value may be NaN or infinite, which is null in JSON.
        if_not_finite: what it means for a main score that examples have no finite scores.
    """

    title: str
    hub_type: str
    higher_is_better: bool = True
    decimals: int = 4
    generated: bool = False
    may_be_null: bool = False
    if_not_finite: str = ""

    @property
    def axis(self) -> str:
        """Label of a figure's axis."""
        return self.title if self.title.startswith("held-out") else f"{self.title} on held-out examples"

    def text(self, value: float | None) -> str:
        """A value as text. None, NaN and infinity are not finite."""
        if value is None or not math.isfinite(value):
            return "not finite"
        return f"{value:.3g}" if abs(value) >= _LARGE else f"{value:.{self.decimals}f}"


SCORES = {
    "accuracy": Score(title="accuracy", hub_type="accuracy", if_not_finite="they count as wrong"),
    "macro_f1": Score(title="macro-F1", hub_type="f1"),
    LOSS: Score(
        title="held-out loss", hub_type="loss", higher_is_better=False, may_be_null=True,
        if_not_finite="the mean has no value",
    ),
    "perplexity": Score(
        title="perplexity", hub_type="perplexity", higher_is_better=False, decimals=2, may_be_null=True
    ),
    "exact_match": Score(title="exact match", hub_type="exact_match", generated=True),
    "token_f1": Score(title="token F1", hub_type="f1", generated=True),
    "rouge_l": Score(title="ROUGE-L", hub_type="rouge", generated=True),
}  # fmt: skip


def scores_in(names: Container[str], suffix: str = "") -> list[str]:
    """The scores that a line of the metrics or a summary must have, by those that it has; without the loss.

    They are those of classification if one of these is there; else perplexity, and what is there of generated text.

    Args:
        names: names of its fields.
        suffix: what follows the names of scores in it.
    """
    if any(name + suffix in names for name in _CLASSIFICATION):
        return list(_CLASSIFICATION)
    generated = [name for name, score in SCORES.items() if score.generated and name + suffix in names]
    return [_FREE_TEXT, *generated]


def shown(scores: list[str]) -> list[str]:
    """The scores of a task that are shown, its main score first.

    A classification task is judged by its accuracy. Free text is judged by the held-out loss, which has no meaning
    beside that of another kind of task.

    Args:
        scores: names of all scores of the task, without the loss; see ``scores_in``.
    """
    return scores if _CLASSIFICATION[0] in scores else [LOSS, *scores]


__all__ = ["LOSS", "SCORES", "Score", "scores_in", "shown"]
