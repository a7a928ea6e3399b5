"""Reads run directories for a report, including runs that did not finish."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.errors import RunError
from ...engine.lm.scores import LOSS, scores_in, shown
from ..config.toml import read_toml
from ..ledger.file import read_ledger
from ..run.directory import CONFIG, LEDGER, METRICS
from ..run.gradip_file import MEASURES, read_gradip
from ..run.jsonl import is_number, read_lines


@dataclass(frozen=True, kw_only=True)
class Run:
    """Contents of a run directory.

    Args:
        path: path of the directory, as the user gave it.
        name: name of the run in the report.
        settings: values in ``config.toml``, by flat names.
        rounds: lines of ``metrics.jsonl`` without the summary, round 0 (before training) first.
        summary: the summary; None if the run did not finish.
        gradip: lines of ``gradip.jsonl``; empty if there is no such file.
    """

    path: Path
    name: str
    settings: dict[str, Any]
    rounds: list[dict[str, Any]]
    summary: dict[str, Any] | None
    gradip: list[dict[str, Any]]

    @property
    def results(self) -> dict[str, Any]:
        """The summary; for a run that did not finish, the fields that follow from its rounds."""
        return self.summary if self.summary is not None else _partial_summary(self.rounds)

    @property
    def scores(self) -> list[str]:
        """Names of the scores that are shown, the main one first; none if the run was never evaluated."""
        return [name for name in shown(scores_in(self.results, "_before")) if f"{name}_before" in self.results]

    @property
    def stopped(self) -> set[str]:
        """Ids of the clients that were stopped early."""
        return {str(client) for client in self.results.get("stopped") or ()}


def read_runs(paths: list[Path]) -> list[Run]:
    """Reads run directories.

    Args:
        paths: the directories. A run is called by the name of its directory, or by its path if the name is not unique.

    Raises:
        RunError: if a directory is not a run directory, or a file in it is damaged.
        ConfigError: if settings cannot be read.
    """
    counts = Counter(path.resolve().name for path in paths)
    return [_read(path, path.resolve().name if counts[path.resolve().name] == 1 else str(path)) for path in paths]


def client_paths(run: Run) -> dict[str, dict[str, list[float]]]:
    """The measures of each client along its path, one value a scalar (local step and query).

    Returns:
        {client: {measure: values}}, for the virtual path (round 0) if there is one, else for all rounds in order.
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
        raise RunError(f"{path} is not a run directory: there is no such directory")
    missing = [file for file in (CONFIG, METRICS) if not (path / file).is_file()]
    if missing:
        raise RunError(f"{path} is not a run directory: it has no {' and no '.join(missing)}")
    metrics = read_lines(path / METRICS)
    summary = metrics.pop()["summary"] if metrics and isinstance(metrics[-1].get("summary"), dict) else None
    _require(all(is_number(line.get("round")) for line in metrics), path / METRICS, "a line has no round")
    gradip = read_gradip(path, read_ledger(path / LEDGER) if (path / LEDGER).is_file() else None)
    return Run(path=path, name=name, settings=read_toml(path / CONFIG), rounds=metrics, summary=summary, gradip=gradip)


def _require(holds: bool, path: Path, problem: str) -> None:
    if not holds:
        raise RunError(f"cannot read {path}: {problem}; the file is damaged or of another version")


def _partial_summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Fields of the summary of an unfinished run; none if it was never evaluated."""
    evaluated = [line for line in rounds if LOSS in line]
    if not evaluated:
        return {}
    first, last = evaluated[0], evaluated[-1]
    return {
        **{
            f"{name}_{when}": line.get(name)
            for name in (*scores_in(first), LOSS)
            for when, line in (("before", first), ("after", last))
        },
        **{
            f"nonfinite_{when}": line["nonfinite"]
            for when, line in (("before", first), ("after", last))
            if "nonfinite" in line
        },
        "bytes_up": sum(line.get("bytes_up", 0) for line in rounds),
        "bytes_down": sum(line.get("bytes_down", 0) for line in rounds),
    }


__all__ = ["MEASURES", "Run", "client_paths", "read_runs"]
