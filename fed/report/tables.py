"""Contents of a report's tables, as text."""

import math
from collections.abc import Callable
from typing import Any

from ...engine.lm.scores import SCORES
from ..config.sections import ClientsConfig
from ..partition import Partition
from ..run.jsonl import is_number
from .runs import Run

Pair = tuple[str, str]
Row = tuple[str, list[str]]  # name, and one cell a run

_NOTHING = "-"

# The main settings, and their names on the page.
_MAIN_SETTINGS = {
    "model": "model",
    "task": "task",
    "data": "data",
    "method": "method",
    "partition": "partition",
    "clients": "clients K",
    "rounds": "rounds R",
    "local_steps": "local steps T",
    "lr": "learning rate",
    "density": "density",
}


def settings(runs: list[Run]) -> tuple[list[Pair], list[Pair], list[Row]]:
    """The settings of some runs.

    Returns:
        Three lists: main settings that are the same in all runs, other settings that are the same in all runs, and
        settings that differ, with one value a run.
    """
    names = dict.fromkeys([*_MAIN_SETTINGS, *(name for run in runs for name in run.settings)])
    names.pop("alpha", None)  # part of the partition's description
    equal: list[Pair] = []
    other: list[Pair] = []
    differing: list[Row] = []
    for name in names:
        values = [_setting(run, name) for run in runs]
        if len(set(values)) > 1:
            differing.append((_MAIN_SETTINGS.get(name, name), values))
        elif values[0] != _NOTHING:
            (equal if name in _MAIN_SETTINGS else other).append((_MAIN_SETTINGS.get(name, name), values[0]))
    return equal, other, differing


def _setting(run: Run, name: str) -> str:
    value = run.settings.get(name)
    if name == "partition" and value in list(Partition):
        return Partition(value).describe(run.settings.get("alpha", ClientsConfig.alpha))
    return _format(value)


def state(runs: list[Run]) -> list[Row]:
    """A row with the state of each run; none if all runs finished."""
    if all(run.summary is not None for run in runs):
        return []
    return [("state", ["finished" if run.summary is not None else _progress(run) for run in runs])]


def _progress(run: Run) -> str:
    last_round = max((line["round"] for line in run.rounds), default=0)
    return f"unfinished: {last_round} of {_format(run.settings.get('rounds'))} rounds"


def results(runs: list[Run]) -> list[Row]:
    """The results of each run. Rows without a value in any run are left out."""
    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "held-out answer tokens": lambda s: _format(s.get("validation_tokens"), ","),
        "held-out examples without finite scores, before → after": lambda s: _join(
            s, "{} → {}", ",", "nonfinite_before", "nonfinite_after"
        ),
        "skipped queries": lambda s: _format(s.get("queries_skipped") or None, ","),
        "bytes up": lambda s: _format(s.get("bytes_up"), ","),
        "bytes down": lambda s: _format(s.get("bytes_down"), ","),
        "bytes of the mask, sent to each client once": lambda s: _format(s.get("mask_bytes"), ","),
        "local steps, total": lambda s: _format(s.get("steps"), ","),
        "seconds per step": lambda s: _format(s.get("seconds_per_step"), ".3g"),
        "share of forward passes in a step": lambda s: _format(s.get("forward_share_of_step"), ".1%"),
        "truncated examples, training and held-out": lambda s: _join(
            s, "{} and {}", ",", "truncated_train", "truncated_validation"
        ),
        "stopped clients": lambda s: (
            _NOTHING if s.get("stopped") is None else ", ".join(map(str, s["stopped"])) or "none"
        ),
        "precision, recall": lambda s: _join(s, "{}, {}", ".3f", "precision", "recall"),
        "weights, fingerprint": lambda s: _format(s.get("weights"))[:12],
    }
    rows = [
        ("trained elements", [_join(run.results, "{} of {}", ",", "masked_elements", "elements") for run in runs]),
        *((f"{score.title}, before → after", [_score(run, name) for run in runs]) for name, score in SCORES.items()),
        *((name, [cell(run.results) for run in runs]) for name, cell in cells.items()),
    ]
    return [(name, values) for name, values in rows if set(values) != {_NOTHING}]


def _score(run: Run, name: str) -> str:
    """A score before and after training."""
    if name not in run.scores:
        return _NOTHING
    values = [run.results.get(f"{name}_{when}") for when in ("before", "after")]
    return " → ".join(SCORES[name].text(value) if value is None or is_number(value) else str(value) for value in values)


def _join(results: dict[str, Any], pattern: str, spec: str, *names: str) -> str:
    if all(results.get(name) is None for name in names):
        return _NOTHING
    return pattern.format(*(_format(results.get(name), spec) for name in names))


def _format(value: object, spec: str = "") -> str:
    """A value as text; ``spec`` is the format of numbers."""
    if value is None:
        return _NOTHING
    return format(value, spec) if is_number(value) else str(value)


def selection(run: Run) -> dict[str, Any] | None:
    """The statistics of virtual-path client selection; None if the run has none.

    Returns:
        "rows": one a client, with both statistics, whether both are above their thresholds (flagged), and whether the
        client holds a single label. "thresholds": {name: value}.
    """
    statistics, thresholds = run.results.get("vp_statistics"), run.results.get("vp_thresholds")
    if not statistics or not thresholds:
        return None
    single_label = run.results.get("single_label_clients")
    rows = []
    for client in sorted(statistics, key=in_order):
        values = {name: statistics[client].get(name) for name in ("rho_later", "rho_quie")}
        flagged = all(is_number(value) and value > thresholds.get(name, math.inf) for name, value in values.items())
        cells = [_format(value, ".4g") for value in values.values()]
        cells.append("yes" if flagged else "no")
        if single_label is None:
            cells.append(_NOTHING)
        else:
            cells.append("yes" if client in map(str, single_label) else "no")
        rows.append((client, cells))
    return {"rows": rows, "thresholds": {name: _format(value, ".4g") for name, value in thresholds.items()}}


def in_order(client: str) -> tuple[int, str]:
    """Sort key for client ids, which sorts them as numbers."""
    return (int(client) if client.isdecimal() else 0, client)


__all__ = ["Pair", "Row", "in_order", "results", "selection", "settings", "state"]
