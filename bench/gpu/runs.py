"""Whole runs on the device, whose ledgers must give the same bits on the CPU: the acceptance test."""

import json
import shutil
from pathlib import Path
from typing import Any

import click
import torch

from ...fed.config.run_config import make_config
from ...fed.config.toml import read_toml, to_toml
from ...fed.run.directory import CONFIG, LEDGER, METRICS
from ...fed.run.execute import execute
from ...fed.run.jsonl import read_lines
from ...fed.run.replay import replay_run
from .part import Record, part

_FIELDS = (
    "accuracy_before",
    "accuracy_after",
    "steps",
    "seconds",
    "seconds_per_step",
    "forward_share_of_step",
    "weights",
    "machine",
)


def run_and_replay(device: torch.device, directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs on the device, then replays the run's ledger on the CPU.

    Args:
        device: device of the run.
        directory: the new run directory.
        settings: settings of the run, by flat names.

    Returns:
        Fields of the run's summary; seconds of a step in each round, the first of which compiles and records; the
        lines of its log; under "replay_on_the_cpu" "same bits" or the two fingerprints.
    """
    log: list[str] = []
    summary = execute(make_config(settings | {"device": device.type}), directory, lambda _: None, log.append)
    on_cpu = directory.with_name(directory.name + "-on-cpu")
    shutil.copytree(directory, on_cpu)
    (on_cpu / CONFIG).write_text(to_toml(read_toml(on_cpu / CONFIG) | {"device": "cpu"}))
    weights = replay_run(on_cpu).weights
    same = weights == summary["weights"]
    rounds = [line for line in read_lines(directory / METRICS) if line.get("seconds_in_steps")]
    return {
        **{name: summary[name] for name in _FIELDS},
        "seconds_per_step_by_round": [line["seconds_in_steps"] / line["steps"] for line in rounds],
        "replay_on_the_cpu": "same bits" if same else f"the run ended with {summary['weights']}, replayed: {weights}",
        "log": log,
    }


def captured_and_eager(device: torch.device, record: Record, directory: Path, settings: dict[str, Any]) -> None:
    """Runs with captured steps and without, and compares each with its replay, and both with one another.

    Args:
        device: device of the runs.
        record: receives "captured", "eager" and "same_ledger".
        directory: directory for the run directories.
        settings: settings of the runs, by flat names.

    Raises:
        SystemExit: if a replay has other bits than its run.
    """
    ledgers = []
    for name, capture in (("captured", "auto"), ("eager", "off")):
        where = directory / name
        record[name] = found = run_and_replay(device, where, settings | {"capture": capture})
        click.echo(f"{name}: {json.dumps(found)}")
        ledgers.append((where / LEDGER).read_bytes())
        if found["replay_on_the_cpu"] != "same bits":
            raise SystemExit(f"{name}: {found['replay_on_the_cpu']}")
    record["same_ledger"] = ledgers[0] == ledgers[1]


def measure(device: torch.device, record: Record) -> None:
    """Fine-tunes the embedded model, with captured steps and without, and replays both ledgers on the CPU."""
    small = (
        {"rounds": 2, "local_steps": 2, "eval_examples": 20}
        if device.type == "cpu"
        else {"rounds": 30, "local_steps": 5}
    )
    captured_and_eager(device, record, record.directory(), small)


if __name__ == "__main__":
    part(measure)()
