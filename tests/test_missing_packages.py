"""What works on a machine that lacks optional packages, data sets included. Such are most machines with a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.imports import ROOT
from helpers.missing import MISSING, environment_without


def run(tmp_path: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT,
        env=environment_without(tmp_path) | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("package", MISSING)
def test_the_packages_are_missing_there(package: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        run(tmp_path, "-c", f"import {package}")


def test_a_run_and_its_replay_need_none_of_them(tmp_path: Path) -> None:
    settings = ("--rounds", "1", "--local-steps", "2", "--eval-examples", "20", "--output", str(tmp_path / "run"))
    assert "run directory" in run(tmp_path, "-m", "meerkat_engine", "run", *settings)
    assert (tmp_path / "run" / "config.toml").exists()
    assert "the same bits" in run(tmp_path, "-m", "meerkat_engine", "replay", str(tmp_path / "run"))


def test_the_gpu_tests_are_found_without_them(tmp_path: Path) -> None:
    """``make test-gpu`` names their file: many others cannot be imported there."""
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pytest" in line and "-m gpu" in line]
    arguments = line.split("-m pytest ")[1].split()
    assert arguments == ["tests/test_gpu.py", "-m", "gpu", "-W", "default"]
    collect = ("--collect-only", "-q", "-p", "no:cacheprovider")
    assert "test_gpu.py" in run(tmp_path, "-m", "pytest", *arguments, *collect, TRITON_INTERPRET="0")
