"""Metrics of generated text, as torchmetrics computes them: SQuAD's exact match and token F1, and ROUGE-L."""

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ConfigError, DataError
from ..extras import install_hint
from .scores import SCORES

# Gets the predictions [n] and the acceptable answers of each, and returns a number.
Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal one of their references, in [0, 1].

    Case, punctuation (ASCII), the articles a, an and the, and white space are left aside, as in SQuAD's own script.
    """
    return _squad(predictions, references)["exact_match"]


def token_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean of the F1 of words, in [0, 1]: the largest over an example's references. Words are as in ``exact_match``.

    Where one of two texts has no words, it is 1 if neither has, else 0, as in the script of SQuAD 2.0.
    """
    return _squad(predictions, references)["f1"]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean of the ROUGE-L F-measure, in [0, 1]: the largest over an example's references.

    Words consist of the letters a to z, in either case, and digits; there is no stemming. So text in another script has
    no words.

    Raises:
        DataError: if no reference has a word.
    """
    if not any(re.search("[a-z0-9]", text.lower()) for texts in references for text in texts):
        raise DataError(
            "rouge-l compares words of the letters a to z and digits, and no answer has one; leave it out of --metrics"
        )
    rouge_score = _torchmetrics().rouge_score
    with torch.device("cpu"):
        scores = rouge_score(list(predictions), [list(texts) for texts in references], "best", rouge_keys="rougeL")
    return _rounded(scores["rougeL_fmeasure"])


METRICS: dict[str, Metric] = {"exact-match": exact_match, "token-f1": token_f1, "rouge-l": rouge_l}


def check_metrics(text: str) -> list[str]:
    """Reads the names of metrics from a setting, and checks that they can be computed.

    Args:
        text: names in ``METRICS``, separated by commas; may be empty.

    Raises:
        ConfigError: if a name is unknown or given twice, or torchmetrics is not installed.
    """
    names = [name.strip() for name in text.split(",")] if text.strip() else []
    named_metrics(names)
    return names


def score_texts(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str | Metric]
) -> dict[str, float]:
    """Compares predictions with the acceptable answers.

    Args:
        predictions: n texts, at least one.
        references: the acceptable answers of each, at least one.
        metrics: names in ``METRICS``; or functions of predictions and references that return a number.

    Returns:
        The value of each metric: that of ``exact-match`` under ``exact_match`` and so on, that of a function under its
        ``__name__``.

    Raises:
        ConfigError: if torchmetrics is missing, a metric is unknown, or a function returns no number, or has no name
            or that of another score.
        DataError: see ``rouge_l``.
    """
    return {name: _value(name, metric(predictions, references)) for name, metric in named_metrics(metrics).items()}


def named_metrics(metrics: Sequence[str | Metric]) -> dict[str, Metric]:
    """The functions that compute metrics, by the name of their score; see ``score_texts``.

    Raises:
        ConfigError: see ``score_texts``.
    """
    named: dict[str, Metric] = {}
    for metric in metrics:
        if isinstance(metric, str):
            name, function = metric.replace("-", "_"), _known(metric)
        else:
            name, function = _name_of(metric), metric
        if name in named:
            raise ConfigError(f"two metrics have the name {name}; leave one out, or give each its own name")
        named[name] = function
    return named


def _known(name: str) -> Metric:
    if name not in METRICS:
        raise ConfigError(f"there is no metric {name!r}; choose from {', '.join(METRICS)}, separated by commas")
    if importlib.util.find_spec("torchmetrics") is None:
        raise _missing("it is not installed")
    return METRICS[name]


def _name_of(metric: Metric) -> str:
    name = getattr(metric, "__name__", None)
    if not isinstance(name, str):
        raise ConfigError(f"the metric {metric!r} has no __name__ to show its value under; pass a function")
    if name in SCORES:
        raise ConfigError(f"the metric {name} has the name of one of this package's scores; give it another")
    return name


def _value(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the metric {name} returned {value!r}, which is no number") from error


def _squad(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    squad = _torchmetrics().squad
    ids = [str(number) for number in range(len(predictions))]
    answers = [{"id": i, "answers": {"text": list(texts)}} for i, texts in zip(ids, references, strict=True)]
    predicted = [{"id": i, "prediction_text": text} for i, text in zip(ids, predictions, strict=True)]
    with torch.device("cpu"):
        return {name: _rounded(value / 100) for name, value in squad(predicted, answers).items()}


def _rounded(value: torch.Tensor) -> float:
    """A share that torchmetrics computed in float32, to the six decimals that are right."""
    return round(float(value), 6)


def _torchmetrics() -> Any:
    """The module with the functions for text of torchmetrics."""
    try:
        from torchmetrics.functional import text
    except ImportError as error:
        raise _missing(error) from error
    return text


def _missing(reason: object) -> ConfigError:
    return ConfigError(f"metrics of generated text need the package torchmetrics ({reason}); {install_hint('metrics')}")


__all__ = ["METRICS", "Metric", "check_metrics", "exact_match", "named_metrics", "rouge_l", "score_texts", "token_f1"]
