"""Calls of the command line, and the metrics that its runs write."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from meerkat_engine.cli import main


def call(*arguments: object, typed: str | None = None) -> Result:
    """Runs a command in this process, with what is typed into it."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=typed)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics. The last line of a finished run has the summary."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary_of(run: Path) -> dict[str, Any]:
    """The summary of a finished run."""
    summary: dict[str, Any] = metrics_of(run)[-1]["summary"]
    return summary
