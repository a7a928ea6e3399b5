"""The number of threads that commands choose."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meerkat_engine.fed.setup.threads import choose_threads

from helpers.models import make_model


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    yield  # type: ignore[misc]
    torch.set_num_threads(1)


def test_small_models_get_one_thread_wherever_they_are(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "small")  # type: ignore[operator]
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    for source in ("embedded", str(tmp_path / "small"), str(tmp_path / "small.gguf")):
        torch.set_num_threads(2)
        choose_threads(source)
        assert torch.get_num_threads() == 1


def test_large_and_unknown_models_keep_the_threads(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    for i in range(2):
        (tmp_path / "large" / f"part-{i}.safetensors").write_bytes(bytes(2**19 + 1))
    for source in (str(tmp_path / "large"), "someone/on-the-hub", str(tmp_path)):
        choose_threads(source)
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_users_choice_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    choose_threads("embedded")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [None, "2"])
def test_a_run_records_the_threads_that_it_used(tmp_path: Path, threads: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS",)}
    command = [sys.executable, "-m", "meerkat_engine", "run", "--rounds", "1", "--local-steps", "1", "--method",
               "random-mask", "--eval-examples", "8", "--output", str(tmp_path / "r")]  # fmt: skip
    chosen = {} if threads is None else {"OMP_NUM_THREADS": threads}
    subprocess.run(command, check=True, capture_output=True, env=environment | chosen)
    assert json.loads((tmp_path / "r" / "origin.json").read_text())["threads"] == int(threads or 1)
