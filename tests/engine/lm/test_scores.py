"""The table of scores: which a line or summary must have, which are shown, and how."""

import math

import pytest

from meerkat_engine.engine.lm.evaluation import Evaluation
from meerkat_engine.engine.lm.scores import LOSS, SCORES, scores_in, shown
from meerkat_engine.engine.lm.text_metrics import METRICS


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["accuracy", "macro_f1", "validation_loss"], ["accuracy", "macro_f1"]),
        (["macro_f1"], ["accuracy", "macro_f1"]),  # accuracy is missing: it must be there
        (["validation_loss", "perplexity"], ["perplexity"]),
        (["rouge_l", "exact_match"], ["perplexity", "exact_match", "rouge_l"]),
        ([], ["perplexity"]),
    ],
)
def test_the_scores_that_must_be_there_follow_from_those_that_are(names: list[str], expected: list[str]) -> None:
    assert scores_in(names) == expected
    assert scores_in([f"{name}_after" for name in names], "_after") == expected


def test_the_main_score_is_shown_first() -> None:
    assert shown(["accuracy", "macro_f1"]) == ["accuracy", "macro_f1"]
    assert shown(["perplexity", "rouge_l"]) == [LOSS, "perplexity", "rouge_l"]
    of_classes = Evaluation(loss=2.0, examples=1, scores={"accuracy": 0.5, "macro_f1": 0.4})
    of_text = Evaluation(loss=2.0, examples=1, scores={"perplexity": 7.4})
    assert of_classes.main == ("accuracy", 0.5)
    assert of_text.main == (LOSS, 2.0)


def test_every_metric_of_generated_text_has_its_entry() -> None:
    generated = [name for name, score in SCORES.items() if score.generated]
    assert generated == [name.replace("-", "_") for name in METRICS]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.25, "0.2500"), ("perplexity", 1234.567, "1234.57"), ("perplexity", 9.1e64, "9.1e+64"),
        ("perplexity", None, "not finite"), (LOSS, math.nan, "not finite"), (LOSS, math.inf, "not finite"),
    ],
)  # fmt: skip
def test_values_as_text(name: str, value: float | None, text: str) -> None:
    assert SCORES[name].text(value) == text
