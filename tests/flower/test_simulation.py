"""The example in Flower's simulation, by `flwr run`: ray actors, of which each serves many nodes."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from meerkat_engine.engine.lm.models import load_model
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.fed import execute, make_config

from helpers.command import summary_of
from helpers.deployment import APP, Deployment, end_all, free_ports, listens, programs, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra frameworks"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SETTINGS = {"clients": 3, "rounds": 4, "local_steps": 2, "eval_every": 1, "partition": "dirichlet", "seed": 5}


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A SuperLink that simulates."""
    directory = tmp_path_factory.mktemp("simulation")
    home = directory / "flwr"
    home.mkdir()
    (port,) = free_ports(1)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "PATH": f"{programs(directory / 'bin')}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    found = Deployment(directory, port, environment)
    try:
        found.start(
            "superlink", "flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", port,
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        wait_until(lambda: listens(port), 60, "the SuperLink listens")
        yield found
    finally:
        for name in list(found.processes):
            with suppress(ProcessLookupError):  # it has ended by itself
                found.kill(name)
        end_all(directory)


def simulated(up: Deployment, name: str, app: Path, output: Path, actors: int) -> str:
    federation = f"num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus={actors}"
    up.run(name, app, ("--federation-config", federation), output=output, deadline=300, wait=300, **SETTINGS)
    return up.finish(name, 500)


def test_the_bits_of_one_process(simulation: Deployment, tmp_path: Path) -> None:
    told = simulated(simulation, "first", APP, tmp_path / "there", actors=2)
    here = execute(make_config(SETTINGS), tmp_path / "here", lambda progress: None, lambda line: None)
    assert summary_of(tmp_path / "there")["weights"] == here["weights"], told
    for name in ("ledger.jsonl", "gradip.jsonl"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    print("\n".join(line for line in told.splitlines() if "answers in" in line))


def test_a_strategy_of_flowers(simulation: Deployment, tmp_path: Path) -> None:
    app = shutil.copytree(APP, tmp_path / "app")
    project = (app / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(
        project.replace("meerkat_flower.server_app:app", "meerkat_flower.stock_server_app:app")
    )
    told = simulated(simulation, "stock", app, tmp_path / "model", actors=1)
    assert (tmp_path / "model").is_dir(), told
    assert told.count("Received 3 results and 0 failures") == SETTINGS["rounds"]
    assert f"weights {fingerprint(load_model(str(tmp_path / 'model')).model)}" in told
    print("\n".join(line for line in told.splitlines() if "MetricRecord" in line or "finished in" in line))
