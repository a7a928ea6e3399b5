"""Metrics of generated text: values worked out by hand, and an implementation of their definitions for random text."""

import random
import re
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from meerkat_engine.engine.errors import ConfigError, DataError
from meerkat_engine.engine.lm.text_metrics import METRICS, check_metrics, exact_match, rouge_l, score_texts, token_f1

from helpers.missing import environment_without


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        # exact match, token F1, ROUGE-L
        ("The cat.", ["a cat"], (1, 1, 1 / 2)),  # articles and punctuation do not count in SQuAD; ROUGE has the words
        ("big black cat", ["black cat"], (0, 2 * (2 / 3) / (2 / 3 + 1), 2 * (2 / 3) / (2 / 3 + 1))),
        ("cat black", ["black cat"], (0, 1, 1 / 2)),  # F1 has no order; ROUGE-L has: one of two words
        ("x y z x", ["x x w"], (0, 2 * (1 / 2 * 2 / 3) / (1 / 2 + 2 / 3), 2 * (1 / 2 * 2 / 3) / (1 / 2 + 2 / 3))),
        ("no", ["yes", "No!"], (1, 1, 1)),  # the best of several references
        ("red car", ["blue car", "red bus stop"], (0, 1 / 2, 1 / 2)),
        ("U.S.A.", ["usa"], (1, 1, 0)),  # ROUGE splits at punctuation: u, s, a
        ("", ["words"], (0, 0, 0)),
        ("something", ["a"], (0, 0, 0)),
        ("two\u2028lines", ["two lines"], (1, 1, 1)),
    ],
)
def test_values_match_a_calculation_by_hand(
    prediction: str, references: list[str], expected: tuple[float, float, float]
) -> None:
    found = score_texts([prediction], [references], list(METRICS))
    assert tuple(found) == ("exact_match", "token_f1", "rouge_l")
    assert tuple(found.values()) == pytest.approx(expected, abs=1e-6)


def test_a_score_is_the_mean_over_the_examples() -> None:
    predictions, references = ["cat", "dog", "a b c", "x"], [["cat"], ["cat"], ["c d"], ["y", "x"]]
    assert score_texts(predictions, references, ["exact-match"]) == {"exact_match": 0.5}
    each = [score_texts([p], [r], list(METRICS)) for p, r in zip(predictions, references, strict=True)]
    whole = score_texts(predictions, references, list(METRICS))
    for name, value in whole.items():
        assert value == pytest.approx(sum(one[name] for one in each) / 4, abs=1e-6)


def squad_words(text: str) -> list[str]:
    """Words as in SQuAD's evaluation script, version 1.1."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(common: int, predicted: int, expected: int) -> float:
    return 2 * common / (predicted + expected) if common else 0.0


def reference_squad(prediction: str, reference: str) -> tuple[float, float]:
    p, r = squad_words(prediction), squad_words(reference)
    if not p or not r:  # SQuAD 2.0; version 1.1 gives an empty answer an F1 of 0, even if it is the right one
        return float(p == r), float(p == r)
    return float(p == r), f1(sum((Counter(p) & Counter(r)).values()), len(p), len(r))


def reference_rouge(prediction: str, reference: str) -> float:
    p, r = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, reference))
    lengths = [[0] * (len(r) + 1) for _ in range(len(p) + 1)]
    for i, a in enumerate(p):
        for j, b in enumerate(r):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if a == b else max(lengths[i][j + 1], lengths[i + 1][j])
    return f1(lengths[-1][-1], len(p), len(r))


def test_values_match_the_definitions_on_random_text() -> None:
    draws = random.Random(0)
    words = ["a", "the", "An", "cat", "dog's", "don't", "3", "3.5", "x-ray", ".", "!", "", " ", "é", "CAT", "\n", "b_c"]

    def text(most: int) -> str:
        return " ".join(draws.choice(words) for _ in range(draws.randint(0, most)))

    for _ in range(300):
        predictions = [text(8) for _ in range(3)]
        references = [["cat", *(text(8) for _ in range(draws.randint(0, 3)))] for _ in predictions]
        pairs = list(zip(predictions, references, strict=True))
        found = score_texts(predictions, references, list(METRICS))
        by_squad = [[max(reference_squad(p, r)[i] for r in rs) for p, rs in pairs] for i in (0, 1)]
        by_rouge = [max(reference_rouge(p, r) for r in rs) for p, rs in pairs]
        for values, name in zip((*by_squad, by_rouge), ("exact_match", "token_f1", "rouge_l"), strict=True):
            assert found[name] == pytest.approx(sum(values) / 3, abs=2e-6), (name, predictions, references)


def test_text_in_which_rouge_finds_no_word_is_an_error() -> None:
    with pytest.raises(DataError, match="rouge-l compares words of the letters a to z and digits, and no answer has"):
        rouge_l(["猫", "犬"], [["猫"], ["犬", "狗"]])
    assert exact_match(["猫", "犬"], [["猫"], ["犬", "狗"]]) == token_f1(["猫"], [["猫"]]) == 1.0
    assert rouge_l(["cat", "犬"], [["cat"], ["犬"]]) == 0.5


def test_scores_do_not_depend_on_the_default_device() -> None:
    with torch.device("meta"):
        assert score_texts(["cat"], [["cat"]], list(METRICS)) == {"exact_match": 1, "token_f1": 1, "rouge_l": 1}


def length_ratio(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return sum(map(len, predictions)) / sum(len(texts[0]) for texts in references)


def test_a_function_of_the_users_is_a_metric() -> None:
    found = score_texts(["abc", "d"], [["ab"], ["cd", "d"]], [length_ratio, "exact-match"])
    assert found == {"length_ratio": 1.0, "exact_match": 0.5}


def perplexity(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return 1.0


def wordless(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Any:
    return "high"


class Nameless:
    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([perplexity], "the metric perplexity has the name of one of this package's scores"),
        ([wordless], "the metric wordless returned 'high', which is no number"),
        ([Nameless()], "has no __name__ to show its value under"),
        ([length_ratio, length_ratio], "two metrics have the name length_ratio"),
        (["bleu"], "there is no metric 'bleu'; choose from exact-match, token-f1, rouge-l, separated by commas"),
    ],
)
def test_metrics_that_cannot_be_used_are_errors(metrics: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        score_texts(["a"], [["b"]], metrics)


def test_a_setting_names_metrics() -> None:
    assert check_metrics("") == check_metrics("  ") == []
    assert check_metrics("rouge-l, exact-match") == ["rouge-l", "exact-match"]
    for text, message in (
        ("rouge", "there is no metric 'rouge'"),
        ("rouge-l,", "there is no metric ''"),
        ("rouge-l,rouge-l", "two metrics have the name rouge_l"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_metrics(text)


@pytest.mark.parametrize("call", ["check_metrics('rouge-l')", "exact_match(['a'], [['b']])"])
def test_without_the_package_the_error_says_what_to_install(call: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"from meerkat_engine.engine.lm.text_metrics import *; {call}"],
        env=environment_without(tmp_path, ("torchmetrics",)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "ConfigError: metrics of generated text need the package torchmetrics (" in last
    assert "run pip install -c constraints.txt '.[metrics]'" in last
