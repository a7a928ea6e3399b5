"""The command line as tests call it, and what its runs leave."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from meerkat_engine.cli import main


def call(*arguments: object) -> Result:
    """Runs a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; of a finished one, the summary is the last."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary_of(run: Path) -> dict[str, Any]:
    """What a finished run came to."""
    found: dict[str, Any] = metrics_of(run)[-1]["summary"]
    return found
