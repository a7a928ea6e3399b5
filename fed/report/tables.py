"""The tables of a report, in words and numbers: what a page shows, before it is HTML."""

import math
from collections.abc import Callable
from typing import Any

from ..config.sections import ClientsConfig
from ..partition import Partition
from ..run.jsonl import is_number
from .runs import Run

Pair = tuple[str, str]
Row = tuple[str, list[str]]  # a cell a run

_NOTHING = "-"

# the settings that a reader looks for first, and what the page calls them
_SETTINGS = {
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
    """The main settings and the others that are equal in all runs; and those that differ, a value a run."""
    names = dict.fromkeys([*_SETTINGS, *(name for run in runs for name in run.settings)])
    names.pop("alpha", None)  # the partition says it where it counts
    equal: list[Pair] = []
    other: list[Pair] = []
    differing: list[Row] = []
    for name in names:
        values = [_setting(run, name) for run in runs]
        if len(set(values)) > 1:
            differing.append((_SETTINGS.get(name, name), values))
        elif values[0] != _NOTHING:
            (equal if name in _SETTINGS else other).append((_SETTINGS.get(name, name), values[0]))
    return equal, other, differing


def _setting(run: Run, name: str) -> str:
    value = run.settings.get(name)
    if name == "partition" and value in list(Partition):
        return Partition(value).describe(run.settings.get("alpha", ClientsConfig.alpha))
    return _shown(value)


def state(runs: list[Run]) -> list[Row]:
    """How far each run came; nothing if all finished."""
    if all(run.summary is not None for run in runs):
        return []
    return [("state", ["finished" if run.summary is not None else _progress(run) for run in runs])]


def _progress(run: Run) -> str:
    done = max((line["round"] for line in run.rounds), default=0)
    return f"unfinished: {done} of {_shown(run.settings.get('rounds'))} rounds"


def results(runs: list[Run]) -> list[Row]:
    """What came out; rows that no run has are left out."""
    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "trained elements": lambda s: _several(s, "{} of {}", ",", "masked_elements", "elements"),
        "accuracy, before → after": lambda s: _several(s, "{} → {}", ".4f", "accuracy_before", "accuracy_after"),
        "macro-F1, before → after": lambda s: _several(s, "{} → {}", ".4f", "macro_f1_before", "macro_f1_after"),
        "bytes up": lambda s: _shown(s.get("bytes_up"), ","),
        "bytes down": lambda s: _shown(s.get("bytes_down"), ","),
        "mask bytes, to each client once": lambda s: _shown(s.get("mask_bytes"), ","),
        "local steps in all": lambda s: _shown(s.get("steps"), ","),
        "seconds per step": lambda s: _shown(s.get("seconds_per_step"), ".3g"),
        "forward share of a step": lambda s: _shown(s.get("forward_share_of_step"), ".1%"),
        "truncated examples, training and held-out": lambda s: _several(
            s, "{} and {}", ",", "truncated_train", "truncated_validation"
        ),
        "stopped clients": lambda s: (
            _NOTHING if s.get("stopped") is None else ", ".join(map(str, s["stopped"])) or "none"
        ),
        "precision, recall": lambda s: _several(s, "{}, {}", ".3f", "precision", "recall"),
        "weights, digest": lambda s: _shown(s.get("weights"))[:12],
    }
    rows = [(name, [cell(run.results) for run in runs]) for name, cell in cells.items()]
    return [(name, values) for name, values in rows if set(values) != {_NOTHING}]


def _several(results: dict[str, Any], pattern: str, spec: str, *names: str) -> str:
    if all(results.get(name) is None for name in names):
        return _NOTHING
    return pattern.format(*(_shown(results.get(name), spec) for name in names))


def _shown(value: object, spec: str = "") -> str:
    return _NOTHING if value is None else format(value, spec) if is_number(value) else str(value)


def selection(run: Run) -> dict[str, Any] | None:
    """The statistics by which virtual-path selection flagged clients: those above both thresholds."""
    statistics, thresholds = run.results.get("vp_statistics"), run.results.get("vp_thresholds")
    if not statistics or not thresholds:
        return None
    single = run.results.get("single_label_clients")
    rows = []
    for client in sorted(statistics, key=in_order):
        found = {name: statistics[client].get(name) for name in ("rho_later", "rho_quie")}
        above = all(is_number(found[name]) and found[name] > thresholds.get(name, math.inf) for name in found)
        alone = _NOTHING if single is None else "yes" if client in map(str, single) else "no"
        rows.append((client, [*(_shown(value, ".4g") for value in found.values()), "yes" if above else "no", alone]))
    return {"rows": rows, "thresholds": {name: _shown(value, ".4g") for name, value in thresholds.items()}}


def in_order(client: str) -> tuple[int, str]:
    """A key that sorts ids of clients by number."""
    return (int(client) if client.isdecimal() else 0, client)


__all__ = ["Pair", "Row", "in_order", "results", "selection", "settings", "state"]
