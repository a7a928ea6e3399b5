"""Fields of a run's summary that do not follow from its metrics: sizes, messages, attackers, client selection."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...engine.errors import RunError
from ...engine.lm.free_text.encoded import EncodedText
from ...engine.lm.scores import LOSS, SCORES, scores_in, shown
from ...engine.parameters import floating_parameters
from ..attack import attack_summary
from ..selection import PathStatistics, Selection
from ..setup.server_and_clients import Federation
from .jsonl import finite_or_none, is_number

_NUMBERS = (
    "validation_examples", "truncated_train", "truncated_validation", "masked_elements", "elements", "steps",
    "queries_skipped", "mask_bytes", "bytes_up", "bytes_down", "bytes_each_way_if_weights_were_sent",
)  # fmt: skip
# Fields that not every summary has, with those that come with them.
_TOGETHER = {
    "nonfinite_after": ("nonfinite_before",),
    "single_label_clients": ("stopped", "precision", "recall"),
    "attackers": ("attack",),
    "epsilon": ("delta",),
    "client_accuracy_mean": ("client_accuracy_worst",),
    "client_accuracy_stopped": ("client_accuracy_mean", "stopped"),
}
_LISTS, _TEXTS = ("stopped", "single_label_clients", "attackers", "client_accuracy"), ("weights", "attack")
_CLIENT_ACCURACY = {f"client_accuracy_{of}" for of in ("mean", "worst", "stopped")}
_MAY_BE_NULL = (
    {"precision", "recall", "seconds_per_step", "forward_share_of_step"}
    | _CLIENT_ACCURACY
    | {f"{name}_{when}" for name, score in SCORES.items() if score.may_be_null for when in ("before", "after")}
)


def check_summary(summary: Any, where: str) -> None:
    """Checks that a summary from a file has the fields that are shown.

    Args:
        summary: the summary, as read from JSON.
        where: file and line number, for messages.

    Raises:
        RunError: if a field is missing or has a value of another kind.
    """
    if not isinstance(summary, dict):
        raise RunError(f"{where}: the summary is no object; the file is damaged")
    names = ["weights", *_NUMBERS, "seconds_per_step", "forward_share_of_step"]
    scores = {*scores_in(summary, "_before"), *scores_in(summary, "_after"), LOSS}
    names += [f"{name}_{when}" for name in SCORES if name in scores for when in ("before", "after")]
    if shown(scores_in(summary, "_before"))[0] == LOSS:
        names.append("validation_tokens")
    names += [name for name in _LISTS if name in summary]
    names += [name for first, others in _TOGETHER.items() if first in summary for name in (first, *others)]
    for name in names:
        if name not in summary or not _is_of_kind(name, summary[name]):
            raise RunError(f"{where}: {name} is missing in the summary, or of another kind; the file is damaged")
    if summary["seconds_per_step"] is None and summary["forward_share_of_step"] is not None:
        raise RunError(f"{where}: the summary has forward_share_of_step without seconds_per_step; the file is damaged")


def _is_of_kind(name: str, value: Any) -> bool:
    """Whether a field has a value of its kind."""
    if value is None:
        return name in _MAY_BE_NULL
    if name in _LISTS:
        return isinstance(value, list)
    return isinstance(value, str) if name in _TEXTS else is_number(value)


def federation_summary(federation: Federation) -> dict[str, Any]:
    """Summary of a federation: size of the training, cost of sending weights, rejected messages, attackers."""
    config, validation = federation.config, federation.data.validation
    weights = [p for _, p in floating_parameters(federation.model)]
    elements = federation.server.replica.terms.elements
    # The calibration is not counted, because it would send no weights.
    answers = config.rounds * config.clients.participants
    return {
        "truncated_train": federation.data.train.truncated,
        "truncated_validation": validation.truncated,
        **({"validation_tokens": validation.answer_tokens} if isinstance(validation, EncodedText) else {}),
        "bytes_each_way_if_weights_were_sent": sum(p.numel() * p.element_size() for p in weights) * answers,
        # adapters, layers and complete models follow from their names; no ids are sent
        "mask_bytes": 8 * elements if config.method.recipe.elements.uses_density else 0,
        "masked_elements": elements,
        "elements": sum(p.numel() for p in weights),
        "rejected_messages": dict(sorted(federation.server.rejected.items())),
        **attack_summary(config.attack.kind, config.clients.count, config.attack.clients),
        **({"delta": config.privacy.delta} if config.privacy.noise else {}),
    }


def selection_summary(selection: Selection, labels: list[list[int]]) -> dict[str, Any]:
    """Summary of early stopping: stopped clients, statistics, and precision and recall for single-label clients.

    Args:
        selection: the run's client selection.
        labels: number of examples by client and label, [K][C]; empty if the clients are on other machines.

    Returns:
        The fields; none if the method does not stop clients early.
    """
    if selection.thresholds is None:
        return {}
    summary: dict[str, Any] = {
        "stopped": selection.stopped,
        "vp_thresholds": dataclasses.asdict(selection.thresholds),
        "vp_statistics": {i: _statistics_fields(of_client) for i, of_client in selection.statistics.items()},
    }
    if not labels:
        return summary
    single_label = {i for i, row in enumerate(labels) if sum(count > 0 for count in row) == 1}
    true_positives = len(single_label.intersection(selection.stopped))
    return summary | {
        "single_label_clients": sorted(single_label),
        "precision": true_positives / len(selection.stopped) if selection.stopped else None,
        "recall": true_positives / len(single_label) if single_label else None,
    }


def client_accuracy_summary(
    recalls: Sequence[float], labels: list[list[int]], stopped: Sequence[int] = ()
) -> dict[str, Any]:
    """Summary of the clients' own accuracy: that on held-out examples of each class in the client's shares of them.

    So a client whose class the model neglects shows, although hardly anything changes for the mean of all examples.

    Args:
        recalls: recall of each class on the held-out examples, [C]; NaN for a class without any.
        labels: number of training examples by client and label, [K][C].
        stopped: ids of the clients that are stopped early.

    Returns:
        Fields: mean and worst of all clients, mean of the stopped ones if there are any, and all values for at most 100
        clients. No fields if recalls or labels are not known. A value is None where a class has no held-out examples.
    """
    if not recalls or not labels:
        return {}
    own = [client_accuracy(recalls, row) for row in labels]
    values = {"client_accuracy_mean": statistics.fmean(own), "client_accuracy_worst": float(np.min(own))}
    if stopped:
        values["client_accuracy_stopped"] = statistics.fmean(own[i] for i in stopped)
    fields: dict[str, Any] = {name: finite_or_none(value) for name, value in values.items()}
    return fields | ({"client_accuracy": [finite_or_none(value) for value in own]} if len(own) <= 100 else {})


def client_accuracy(recalls: Sequence[float], counts: Sequence[int]) -> float:
    """Accuracy on held-out examples in the shares in which a client has the classes, ``sum_c share_c recall_c``.

    Args:
        recalls: recall of each class, [C]; NaN for a class without held-out examples.
        counts: number of the client's examples of each class, [C].

    Returns:
        The accuracy in [0, 1]; NaN if the client has a class without held-out examples.
    """
    pairs = zip(recalls, counts, strict=True)
    return sum(recall * count for recall, count in pairs if count) / sum(counts)


def _statistics_fields(statistics: PathStatistics) -> dict[str, float | None]:
    """Statistics of a path. A ratio is None if it is infinite, because the later GradIP is 0."""
    return {name: finite_or_none(value) for name, value in vars(statistics).items()}


__all__ = ["check_summary", "client_accuracy", "client_accuracy_summary", "federation_summary", "selection_summary"]
