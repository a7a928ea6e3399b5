"""What a run came to: the last line of ``metrics.jsonl``, but for what its rounds' lines add up to."""

import dataclasses
from typing import Any

from ...engine.parameters import floating_parameters
from ..attack import attack_summary
from ..selection import Selection, Statistics
from ..setup.server_and_clients import Federation
from .jsonl import finite


def federation_summary(federation: Federation) -> dict[str, Any]:
    """How much was trained, what sending weights would have cost, who was refused, stopped early or hostile."""
    config, weights = federation.config, [p for _, p in floating_parameters(federation.model)]
    elements = federation.server.replica.terms.elements
    answers = config.rounds * config.clients.participants  # the calibration would send no weights
    return {
        "truncated_train": federation.data.train.truncated,
        "truncated_validation": federation.data.validation.truncated,
        "bytes_each_way_if_weights_were_sent": sum(p.numel() * p.element_size() for p in weights) * answers,
        # adapters, layers and whole models have names, which need no ids
        "mask_bytes": 8 * elements if config.method.recipe.elements.ranked else 0,
        "masked_elements": elements,
        "elements": sum(p.numel() for p in weights),
        "rejected_messages": dict(sorted(federation.server.rejected.items())),
        **attack_summary(config.attack.kind, config.clients.count, config.attack.clients),
        **({"delta": config.privacy.delta} if config.privacy.noise else {}),
    }


def selection_summary(selection: Selection, labels: list[list[int]]) -> dict[str, Any]:
    """Who was stopped early, why, and how well that found the clients that hold one label only.

    Args:
        selection: of the run.
        labels: examples by client and label; none where the clients are elsewhere.
    """
    if selection.thresholds is None:
        return {}
    found: dict[str, Any] = {
        "stopped": selection.stopped,
        "vp_thresholds": dataclasses.asdict(selection.thresholds),
        "vp_statistics": {i: _statistics(each) for i, each in selection.statistics.items()},
    }
    if not labels:
        return found
    single = {i for i, row in enumerate(labels) if sum(count > 0 for count in row) == 1}
    right = len(single.intersection(selection.stopped))
    return found | {
        "single_label_clients": sorted(single),
        "precision": right / len(selection.stopped) if selection.stopped else None,
        "recall": right / len(single) if single else None,
    }


def _statistics(found: Statistics) -> dict[str, float | None]:
    """Of a path; one that went silent has no finite ratio."""
    return {name: finite(value) for name, value in vars(found).items()}


__all__ = ["federation_summary", "selection_summary"]
