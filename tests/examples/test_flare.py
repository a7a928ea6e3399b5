"""``examples/flare``: in FLARE's simulator, the bits of the same federation in one process."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.fed import simulate

from helpers.examples import EXAMPLES, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("nvflare") is None, reason="needs the extra frameworks"),
]


@pytest.fixture
def federation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that server and sites of the example share."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "flare"))
    import federation

    return federation


def test_the_sites_come_to_the_bits_of_a_simulation(tmp_path: Path, federation: Any) -> None:
    run("flare/job.py", "--sites", 2, "--rounds", 3, "--workspace", tmp_path, "--output", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    mask, threads = tmp_path / "mask.safetensors", torch.get_num_threads()
    torch.set_num_threads(1)
    server = federation.make_server(mask, 2)
    base = fingerprint(server.replica.model)
    results = list(simulate(server, [federation.make_client(mask, i, 2) for i in range(2)], 3))
    torch.set_num_threads(threads)
    assert found["weights"] == fingerprint(server.replica.model) != base
    assert found["losses"] == [result.line.loss for result in results]
    # one process a site, the same in all rounds
    processes = [{site: told["process"] for site, told in answers.items()} for answers in found["told"]]
    assert sorted(processes[0]) == ["site-1", "site-2"]
    assert processes == [processes[0]] * 3
    assert len(set(processes[0].values())) == 2
