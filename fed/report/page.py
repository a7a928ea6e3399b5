"""``write_report``: writes one self-contained HTML page about one or several run directories."""

import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from ... import __version__
from ...engine.atomic_files import write_atomic
from ...engine.errors import ConfigError
from ...engine.extras import require_matplotlib
from ...engine.lm.scores import SCORES
from ..run.directory import CONFIG
from ..run.jsonl import is_number
from .figures import Curve, Picture, draw_curves, draw_histogram, draw_paths
from .runs import Run, client_paths, read_runs
from .tables import in_order, results, selection, settings, state

_MAX_CLIENTS = 40  # clients in a figure; more bars would be too thin


def write_report(paths: list[Path], output: Path | None = None) -> Path:
    """Writes the report of some runs.

    Args:
        paths: run directories.
        output: path of the new file; None: ``report.html``, in the run's directory if there is one run, else in the
            current directory.

    Returns:
        Path of the file.

    Raises:
        ConfigError: if the file exists, its directory does not, or matplotlib is missing.
        RunError: if a directory holds no run, or a file in it is damaged.
    """
    require_matplotlib()
    runs = read_runs(paths)
    output = output or (paths[0] if len(paths) == 1 else Path()) / "report.html"
    if output.exists():
        raise ConfigError(f"{output} exists already; choose another file, nothing was changed")
    if not output.parent.is_dir():
        raise ConfigError(f"there is no directory {output.parent} to write {output.name} to; create it first")
    write_atomic(output, _page(runs).encode())
    return output


def _page(runs: list[Run]) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files(__package__) / "page.html").read_text(encoding="utf-8"))
    equal, other, differing = settings(runs)
    return template.render(
        title=f"Report: {runs[0].name}" if len(runs) == 1 else f"Report: {len(runs)} runs",
        version=__version__,
        names=[run.name for run in runs],
        equal=equal,
        other=other,
        rows=state(runs) + differing + results(runs),
        by_round=_by_round(runs),
        by_bytes=_by_bytes(runs),
        sections=[
            {
                "name": run.name,
                "histogram": _histogram(run),
                "paths": _paths(run),
                "selection": selection(run),
                "commands": [
                    f"meerkat-engine run --config {shlex.quote(str(run.path / CONFIG))} --output NEW",
                    f"meerkat-engine replay {shlex.quote(str(run.path))}",
                ],
            }
            for run in runs
        ],
    )


def _by_round(runs: list[Run]) -> Picture | None:
    panels = {score.title: _curves([run for run in runs if name in run.scores], name) for name, score in SCORES.items()}
    panels["training loss"] = _curves(runs, "loss", first=1)  # round 0 has none
    panels = {label: curves for label, curves in panels.items() if curves}
    if not panels:
        return None
    descriptions = " ".join(f"{label}: {_in_words(curves)}" for label, curves in panels.items())
    return draw_curves(panels, "round", f"Line charts against the round, one line a run. {descriptions}")


def _by_bytes(runs: list[Run]) -> Picture | None:
    panels: dict[str, list[Curve]] = {}
    for run in runs:
        if run.scores and (curve := _curve_by_bytes(run, run.scores[0])).x:
            panels.setdefault(SCORES[run.scores[0]].title, []).append(curve)
    if not panels:
        return None
    charts = "Line chart" if len(panels) == 1 else "Line charts"
    titles, words = " and ".join(panels), " ".join(_in_words(curves) for curves in panels.values())
    alt = f"{charts} of {titles} against the bytes sent so far, one line a run. {words}"
    return draw_curves(panels, "bytes sent so far, up and down", alt, x_in_bytes=True)


def _curves(runs: list[Run], key: str, first: int = 0) -> list[Curve]:
    """A value in the metrics against the round, from round ``first`` on, of each run that has it."""
    lines_by_run = {
        run.name: [line for line in run.rounds if is_number(line.get(key)) and line["round"] >= first] for run in runs
    }
    return [
        Curve(name, [line["round"] for line in lines], [line[key] for line in lines])
        for name, lines in lines_by_run.items()
        if lines
    ]


def _curve_by_bytes(run: Run, key: str) -> Curve:
    sent, x, y = 0.0, [], []
    for line in run.rounds:
        sent += line.get("bytes_up", 0) + line.get("bytes_down", 0)
        if is_number(line.get(key)):
            x.append(sent)
            y.append(line[key])
    return Curve(run.name, x, y)


def _in_words(curves: list[Curve]) -> str:
    """First and last point of each curve, in words."""
    return "; ".join(f"{c.name} from {c.y[0]:.4f} at {c.x[0]:g} to {c.y[-1]:.4f} at {c.x[-1]:g}" for c in curves) + "."


def _histogram(run: Run) -> dict[str, Any] | None:
    counts = run.results.get("examples_by_client_and_label")
    if not isinstance(counts, list) or not counts:  # with many clients, the summary only has their number
        return None
    names, words = run.results.get("natural_clients"), run.results.get("labels")
    clients = [str(name) for name in names] if isinstance(names, list) else [str(i) for i in range(len(counts))]
    labels = [str(word) for word in words] if isinstance(words, list) else [f"label {i}" for i in range(len(counts[0]))]
    by_label = " by label" if labels else ""  # free text may have no classes
    shown, counts_shown = clients[:_MAX_CLIENTS], counts[:_MAX_CLIENTS]
    alt = (
        f"Stacked bar chart: examples of {len(shown)} clients by label ({', '.join(labels)}). "
        if labels
        else f"Bar chart: examples of {len(shown)} clients. "
    )
    note = f"The first {_MAX_CLIENTS} of {len(counts)} clients." if len(counts) > _MAX_CLIENTS else ""
    return {
        "picture": draw_histogram(
            shown, labels or ["examples"], counts_shown, f"{alt}The table below has the numbers."
        ),
        "by_label": by_label,
        "note": note,
        "labels": labels,
        "rows": [
            (client, [sum(row), *(row if labels else [])]) for client, row in zip(shown, counts_shown, strict=True)
        ],
    }


def _paths(run: Run) -> Picture | None:
    paths = client_paths(run)
    if not paths:
        return None
    calibrated = any(line["round"] == 0 for line in run.gradip)
    where = "of the virtual path" if calibrated else "of training, over all rounds"
    queries = run.settings.get("queries", 1)
    x = "local step" if queries == 1 else f"scalar ({queries} a local step)"
    stopped = ", ".join(sorted(run.stopped & paths.keys(), key=in_order)) or "none"
    alt = (
        f"Three line charts of |GradIP|, gradient norm and cosine of {len(paths)} clients against the {x} "
        f"{where}. Values are moving means over 10 values; the axes of |GradIP| and norm are logarithmic. "
        f"Stopped clients, in another colour: {stopped}."
    )
    return draw_paths(paths, run.stopped, f"{x} {where}", alt)


__all__ = ["write_report"]
