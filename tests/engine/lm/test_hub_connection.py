"""Models and data sets from a hub: downloaded, read from the cache, and missed at once where the hub is silent."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from meerkat_engine.engine.lm import embedded, hub_connection
from meerkat_engine.engine.lm.hub_connection import hub_or_cache
from meerkat_engine.engine.parameters import fingerprint

from helpers.hub import HubServer, hub_server

LOAD = """
import sys, time
from meerkat_engine import MeerkatError, fingerprint, load_model
from meerkat_engine.engine.lm.hub import HubSource
def rows(name):
    return [list(HubSource(path=name).rows(split)) for split in ("train", "validation")]
start = time.monotonic()
for load in (lambda name: fingerprint(load_model(name).model), rows):
    for name in sys.argv[1:]:
        try:
            print(load(name))
        except MeerkatError as error:
            print(error)
print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
"""


def load(home: Path, url: str, *names: str) -> tuple[list[str], int, str]:
    """Loads models and data sets of these names in a process of its own: what was printed, seconds, and warnings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", LOAD, *names], env=environment, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines(), int(process.stderr.splitlines()[-1].split()[0]), process.stderr


def test_downloads_and_their_cache(tmp_path: Path) -> None:
    """With an empty cache and a hub, then with that cache and without the hub."""
    shutil.copytree(embedded.DIRECTORY, tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    (data / "validation.jsonl").write_text('{"text": "c", "label": 1}\n')
    expected = [
        fingerprint(embedded.load().model),
        "[[{'text': 'a', 'label': 0}, {'text': 'b', 'label': 1}], [{'text': 'c', 'label': 1}]]",
    ]
    with hub_server({"me/tiny": tmp_path / "model", "datasets/me/tiny": data}) as server:
        url = server.url
        assert load(tmp_path / "home", url, "me/tiny")[0] == expected
        assert sum("GET" in request and "model.safetensors" in request for request in server.requests) == 1
        assert any("train.jsonl" in request for request in server.requests)
    printed, seconds, errors = load(tmp_path / "home", url, "me/tiny", "me/other")
    assert [printed[0], printed[2]] == expected
    assert f"the Hugging Face hub at {url} does not answer (ConnectError: " in errors
    assert "'me/tiny' was read from the cache" in errors
    assert "cannot load the model 'me/other' on the Hugging Face hub" in printed[1]
    assert "does not answer" in printed[1]
    assert "cannot load me/other from the hub" in printed[3]
    assert "does not answer" in printed[3]
    assert seconds < 20  # a minute and a half with the clients' own repetitions


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short limits, and a hub that is not switched off."""
    monkeypatch.setattr(hub_connection, "_CONNECT", 1.0)
    monkeypatch.setattr(hub_connection, "_ANSWER", 1.0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("limits")
def test_a_hub_that_never_answers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_a_file() -> None:
        with hub_or_cache("x"):
            assert constants.HF_HUB_OFFLINE
            raise FileNotFoundError("no such file.")

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(
            ConnectionError, match=r"does not answer \(ReadTimeout: .*, and x is not in the cache \(no "
        ):
            open_a_file()
        assert time.monotonic() - start < 5
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("limits")
def test_a_slow_hub_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    respond = HubServer.finish_request

    def slow(self: HubServer, request: Any, address: Any) -> None:
        time.sleep(0.5)
        respond(self, request, address)

    monkeypatch.setattr(HubServer, "finish_request", slow)
    with hub_server({}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        with hub_or_cache("x"):
            assert not constants.HF_HUB_OFFLINE
        assert server.requests == ["HEAD /"]


@pytest.mark.usefixtures("limits")
def test_errors_that_are_not_of_the_cache_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="weights are packed"), hub_or_cache("x"):
        raise ValueError("its weights are packed")
