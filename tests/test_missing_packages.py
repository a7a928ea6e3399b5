"""What works on a machine that lacks optional packages, data sets included. Such are most machines with a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.imports import ROOT

MISSING = ("datasets", "gguf", "tomli_w", "dp_accounting", "flwr", "matplotlib")


def run_without(call: str, cwd: Path = ROOT, **environment: str) -> str:
    """Runs a line of Python in a new process in which the packages in ``MISSING`` cannot be imported."""
    script = f"import sys\nfor name in {MISSING}: sys.modules[name] = None\n{call}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def command(*arguments: str) -> str:
    return f"from meerkat_engine.cli import main; main({list(arguments)})"


def test_a_run_and_its_replay_need_none_of_them(tmp_path: Path) -> None:
    directory = str(tmp_path / "run")
    settings = ("--rounds", "1", "--local-steps", "2", "--eval-examples", "20", "--eval-every", "1")
    assert "run directory" in run_without(command("run", *settings, "--output", directory), tmp_path)
    assert (tmp_path / "run" / "config.toml").exists()
    assert "the same bits" in run_without(command("replay", directory), tmp_path)


@pytest.mark.parametrize("name", ["bench", "bench-server"])
def test_benchmarks_start_without_them(name: str, tmp_path: Path) -> None:
    assert "Usage" in run_without(command(name, "--help"), tmp_path)


def test_the_gpu_tests_are_found_without_them() -> None:
    """``make test-gpu`` names their file: many others cannot be imported there."""
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pytest" in line and "-m gpu" in line]
    assert line.split("-m pytest ")[1] == "tests/test_gpu.py -m gpu -W default"
    arguments = [*line.split("-m pytest ")[1].split(), "--collect-only", "-q", "-p", "no:cacheprovider"]
    assert "test_gpu.py" in run_without(f"import pytest; assert pytest.main({arguments}) == 0", TRITON_INTERPRET="0")
