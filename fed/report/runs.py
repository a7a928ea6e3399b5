"""Run directories as a report reads them: also runs that did not finish."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.errors import RunError
from ..config.toml import read_toml
from ..run.directory import CONFIG, GRADIP, METRICS
from ..run.jsonl import is_number, read_lines

MEASURES = ("gradip", "norm", "cosine")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run.

    Args:
        path: its directory, as given.
        name: what the report calls it.
        settings: of ``config.toml``.
        rounds: of ``metrics.jsonl``, round 0 (before training) first.
        summary: None if the run did not finish.
        gradip: of ``gradip.jsonl``; empty where there is no such file.
    """

    path: Path
    name: str
    settings: dict[str, Any]
    rounds: list[dict[str, Any]]
    summary: dict[str, Any] | None
    gradip: list[dict[str, Any]]

    @property
    def results(self) -> dict[str, Any]:
        """The summary; for a run that did not finish, as much of it as its rounds tell."""
        return self.summary if self.summary is not None else _so_far(self.rounds)

    @property
    def stopped(self) -> set[str]:
        """Ids of the clients that were stopped early."""
        return {str(client) for client in self.results.get("stopped") or ()}


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs in some directories.

    Raises:
        RunError: if one is no run directory, or has a damaged file.
        ConfigError: if settings cannot be read.
    """
    count = Counter(path.resolve().name for path in paths)
    return [_read(path, path.resolve().name if count[path.resolve().name] == 1 else str(path)) for path in paths]


def path_of_clients(run: Run) -> dict[str, dict[str, list[float]]]:
    """Each client's measures, one value a local step.

    Returns:
        {client: {measure: values}}: of round 0, the calibration path, where there is one; else of all rounds in turn.
    """
    calibration = [line for line in run.gradip if line["round"] == 0]
    paths: dict[str, dict[str, list[float]]] = {}
    for line in calibration or run.gradip:
        for client, values in line["clients"].items():
            path = paths.setdefault(client, {measure: [] for measure in MEASURES})
            for measure in MEASURES:
                path[measure] += values[measure]
    return paths


def _read(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise RunError(f"{path} is no run directory: there is no such directory")
    missing = [file for file in (CONFIG, METRICS) if not (path / file).is_file()]
    if missing:
        raise RunError(f"{path} is no run directory: it has no {' and no '.join(missing)}")
    metrics = read_lines(path / METRICS)
    summary = metrics.pop()["summary"] if metrics and isinstance(metrics[-1].get("summary"), dict) else None
    _require(all(is_number(line.get("round")) for line in metrics), path / METRICS, "a line has no round")
    gradip = read_lines(path / GRADIP)
    _require(all(map(_is_gradip, gradip)), path / GRADIP, f"a line lacks round, clients, or lists of {MEASURES}")
    return Run(path=path, name=name, settings=read_toml(path / CONFIG), rounds=metrics, summary=summary, gradip=gradip)


def _is_gradip(line: dict[str, Any]) -> bool:
    clients = line.get("clients")
    return (
        is_number(line.get("round"))
        and isinstance(clients, dict)
        and all(
            isinstance(path, dict)
            and all(isinstance(path.get(m), list) and all(map(is_number, path[m])) for m in MEASURES)
            for path in clients.values()
        )
    )


def _require(holds: bool, path: Path, rule: str) -> None:
    if not holds:
        raise RunError(f"cannot report {path}: {rule}; the file is damaged or of another version")


def _so_far(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    evaluated = [line for line in rounds if is_number(line.get("accuracy"))]
    if not evaluated:
        return {}
    first, last = evaluated[0], evaluated[-1]
    return {
        "accuracy_before": first["accuracy"],
        "accuracy_after": last["accuracy"],
        "macro_f1_before": first.get("macro_f1"),
        "macro_f1_after": last.get("macro_f1"),
        "bytes_up": sum(line.get("bytes_up", 0) for line in rounds),
        "bytes_down": sum(line.get("bytes_down", 0) for line in rounds),
    }


__all__ = ["MEASURES", "Run", "path_of_clients", "read_runs"]
