"""Tests of ``meerkat-engine doctor``: what it finds, and that it notices what does not work."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from meerkat_engine.cli import main
from meerkat_engine.engine.backend import TorchBackend
from meerkat_engine.fed import doctor as module


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", "--offline", *arguments])


def found(result: Result) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in json.loads(result.output)}


def test_every_line_has_a_name_and_what_was_found(tmp_path: Path) -> None:
    result = call("--output", str(tmp_path / "runs"))
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines()}
    assert f"torch {torch.__version__}" in lines["versions"]
    assert f"{os.cpu_count()} cores" in lines["cpu"]
    assert "cpu: 3 sparse steps have the bits of the reference" in lines["steps"]
    assert lines["hub"].split()[1].startswith("https://")
    assert f"{tmp_path / 'runs'} can be written" in lines["runs"]
    assert not (tmp_path / "runs").exists()  # nothing is left behind


def test_a_directory_with_runs_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert call("--output", str(tmp_path)).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_directory_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call("--output", str(tmp_path / "file"))
    assert result.exit_code == 1
    assert "PROBLEM: cannot write to the run directory" in result.output
    data = found(call("--json", "--output", str(tmp_path / "file" / "runs")))
    assert [name for name, finding in data.items() if finding["problem"]] == ["runs"]


def test_other_bits_than_the_references_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_bits", lambda device, backend: f"bits of {backend}")
    result = call("--output", str(tmp_path))
    assert result.exit_code == 1
    assert "PROBLEM: cpu: 3 sparse steps have OTHER BITS than those of the reference" in result.output


def test_the_bits_depend_on_the_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a wrong generator is noticed."""
    cpu = torch.device("cpu")
    right = module._bits(cpu, "torch")
    draw = TorchBackend._draw

    def wrong(self: TorchBackend, *arguments: Any, **others: Any) -> Tensor:
        return draw(self, *arguments, **others) + 2.0**-10

    monkeypatch.setattr(TorchBackend, "_draw", wrong)
    assert module._bits(cpu, "torch") != right


def test_steps_that_fail_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(module, "_bits", fail)
    result = call("--output", str(tmp_path))
    assert result.exit_code == 1
    assert "PROBLEM: cpu: 3 steps failed: RuntimeError: no kernel image\n" in result.output


@pytest.mark.parametrize(
    ("installed", "environment", "text"),
    [
        (None, "0", "absent: masked operations are those of torch or numba, with the same bits"),
        ("3.7.1", "1", "3.7.1, interpreted (TRITON_INTERPRET=1): slow, for tests"),
    ],
)
def test_triton(installed: str | None, environment: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_version", lambda name: installed)
    monkeypatch.setenv("TRITON_INTERPRET", environment)
    assert module._triton().text == text


def test_extras_that_are_missing_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    version = module._version
    missing = {"matplotlib": None, "peft": "0.1"}  # the second is too old
    monkeypatch.setattr(module, "_version", lambda name: missing[name] if name in missing else version(name))
    data = module._extras().data
    assert data["missing"]["bench"] == ["matplotlib"]
    assert data["missing"]["lora"] == ["peft"]
    assert "bench" not in data["present"]
    assert not {"test", "dev", "frameworks"} & {*data["present"], *data["missing"]}
    assert "pip install -c constraints.txt '.[" in module._extras().text


def test_a_package_that_is_only_on_the_path_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = module._version
    monkeypatch.setattr(module, "_version", lambda name: None if name == "meerkat-engine" else version(name))
    data = found(call("--json", "--output", str(tmp_path)))
    assert data["versions"]["data"]["meerkat-engine"] == "not installed"
    assert data["extras"]["text"].startswith("unknown")


@pytest.mark.parametrize("reason", [None, "ConnectError: no network"])
def test_the_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    from meerkat_engine.engine.lm import hub_connection

    monkeypatch.setattr(hub_connection.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_connection, "_why_silent", lambda: reason)
    data = json.loads(CliRunner().invoke(main, ["doctor", "--json", "--output", str(tmp_path)]).output)[-1]
    assert data["data"]["answers"] == (reason is None)
    assert ("does not answer (ConnectError: no network)" in data["text"]) == (reason is not None)
