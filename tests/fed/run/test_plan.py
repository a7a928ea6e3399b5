"""Tests of ``run --dry-run``: what it announces is what the run then needs, and it writes nothing."""

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from meerkat_engine.cli import main
from meerkat_engine.fed import execute, make_config
from meerkat_engine.fed.run.plan import Plan, make_plan, plan_lines

SMALL: dict[str, Any] = {
    "rounds": 3, "local_steps": 2, "clients": 3, "batch_size": 4, "calibration_texts": 16, "eval_examples": 20,
    "eval_every": 2,
}  # fmt: skip
VIRTUAL_PATH = {"vp_steps": 8, "vp_initial": 3, "vp_later": 4, "vp_null_paths": 3}


def silent(_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        ({}, 2),
        ({"clients_per_round": 2, "queries": 3}, 6),
        ({"method": "decomfl"}, 6),
        ({"method": "fedavg"}, 1),
        ({"method": "lora-fedzo"}, 2),
        ({"method": "full-fedzo", "rounds": 1, "local_steps": 1}, 2),
        ({"method": "meerkat-vp", **VIRTUAL_PATH, "vp_rho_later": 1e9, "vp_rho_quie": 1.0, "vp_sigma": 1.0}, 2),
        ({"dp_noise": 1.0, "dp_clip": 1.0, "clients": 1, "rounds": 1, "schedule": "linear"}, 2),
        ({"attack": "sign-flip", "attackers": 2}, 2),
    ],
    ids=str,
)
def test_a_plan_is_what_the_run_needs(settings: dict[str, Any], forwards: int, tmp_path: Path) -> None:
    config = make_config({**SMALL, **settings})
    plan = make_plan(config, silent)
    summary = execute(config, tmp_path / "r", silent, silent)
    assert (plan.elements, plan.masked_elements) == (summary["elements"], summary["masked_elements"])
    assert plan.mask_bytes == summary["mask_bytes"]
    assert plan.forwards_a_step == forwards
    assert plan.steps == summary["steps"]
    calibration = config.clients.count if "vp_steps" in settings else 0
    headers_and_scalars = calibration * (40 + 4 * 8)
    answers = config.rounds * config.clients.participants
    assert summary["bytes_up"] == answers * plan.bytes_up + headers_and_scalars
    assert plan.seconds_a_step > 0
    assert plan.seconds > plan.steps * plan.seconds_a_step


def test_steps_count_null_paths_and_the_calibration() -> None:
    plan = make_plan(make_config({**SMALL, "method": "meerkat-vp", **VIRTUAL_PATH}), silent)
    assert plan.steps == 3 * 3 * 2 + (3 + 3) * 8
    (line,) = [line for line in plan_lines(plan, make_config(SMALL)) if line.startswith("steps")]
    assert "and 48 to find extreme non-IID clients" in line


@pytest.mark.parametrize(("rounds", "every", "evaluations"), [(3, 0, 2), (3, 2, 3), (4, 2, 3), (1, 1, 2), (5, 1, 6)])
def test_evaluations_are_those_of_the_run(rounds: int, every: int, evaluations: int, tmp_path: Path) -> None:
    config = make_config({**SMALL, "rounds": rounds, "eval_every": every, "local_steps": 1})
    assert make_plan(config, silent).evaluations == evaluations
    lines: list[Any] = []
    execute(config, tmp_path / "r", lines.append, silent)
    assert sum(progress.score is not None for progress in lines) == evaluations


def dry_run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", "--dry-run", *arguments])


def test_the_command_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = dry_run("--rounds", "2", "--batch-size", "4", "--output", "runs/x")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
    lines = {line.split("  ")[0]: line for line in result.output.splitlines()}
    assert re.search(r"838 of 83,776 elements \(sensitivity\); 6\.7 kB of ids", lines["mask"])
    assert re.search(r"2 forward passes over \d+ tokens on average; \d+ ms \(measured\)", lines["a step"])
    assert "240 B up, 240 B down" in lines["a round"]
    assert re.search(r"about \d+ s in one process: steps \d+ s, 2 evaluations \d+ s", lines["time"])


def test_what_would_stop_the_run_stops_the_plan(tmp_path: Path) -> None:
    result = dry_run("--batch-size", "900")
    assert result.exit_code == 1
    assert "800 examples cannot give 4 clients 900 each" in result.output
    result = dry_run("--resume", str(tmp_path / "r"), "--rounds", "2")
    assert result.exit_code == 1
    assert "--dry-run plans a new run in one process; leave --resume and torchrun out" in result.output


def test_long_times_and_generated_answers_in_words() -> None:
    fields: dict[str, Any] = {
        "elements": 10**9, "masked_elements": 10**6, "mask_source": "sensitivity", "mask_bytes": 0, "steps": 10_000,
        "forwards_a_step": 2, "tokens_a_step": 400.0, "seconds_a_step": 1.0, "evaluations": 3,
        "seconds_an_evaluation": 300.0, "bytes_up": 80, "bytes_down": 80, "host_bytes": None,
        "device_bytes": 8 * 10**9, "generates": True,
    }  # fmt: skip
    text = "\n".join(plan_lines(Plan(**fields), make_config(SMALL)))
    assert "about 3.0 h in one process: steps 2.8 h, 3 evaluations 15 min; generated answers take longer" in text
    assert "unknown; on the GPU 8.0 GB" in text
    assert "of ids" not in text
