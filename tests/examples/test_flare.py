"""``examples/flare`` in FLARE's simulator gives the bits of the same federation in one process."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.fed import simulate

from helpers.examples import EXAMPLES, run_example

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("nvflare") is None, reason="needs the extra frameworks"),
]


@pytest.fixture
def federation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the example's server and sites share."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "flare"))
    import federation

    return federation


def test_flare_gives_the_bits_of_a_simulation(tmp_path: Path, federation: Any) -> None:
    run_example("flare/job.py", "--sites", 2, "--rounds", 3, "--workspace", tmp_path, "--output", tmp_path / "out.json")
    output = json.loads((tmp_path / "out.json").read_text())
    mask, threads = tmp_path / "mask.safetensors", torch.get_num_threads()
    torch.set_num_threads(1)
    server = federation.make_server(mask, 2)
    base = fingerprint(server.replica.model)
    results = list(simulate(server, [federation.make_client(mask, i, 2) for i in range(2)], 3))
    torch.set_num_threads(threads)
    assert output["weights"] == fingerprint(server.replica.model) != base
    assert output["losses"] == [result.record.loss for result in results]
    # Each site has one process, which is the same in all rounds.
    processes = [
        {site: metrics["process"] for site, metrics in metrics_by_site.items()} for metrics_by_site in output["metrics"]
    ]
    assert sorted(processes[0]) == ["site-1", "site-2"]
    assert processes == [processes[0]] * 3
    assert len(set(processes[0].values())) == 2
