"""The example app in Flower's simulation, by `flwr run`: each of Ray's actors serves many nodes."""

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
    """A SuperLink that simulates its nodes."""
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
    running = Deployment(directory, port, environment)
    try:
        running.start(
            "superlink", "flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", port,
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        wait_until(lambda: listens(port), 60, "the SuperLink listens")
        yield running
    finally:
        for name in list(running.processes):
            with suppress(ProcessLookupError):  # it has already ended
                running.kill(name)
        end_all(directory)


def run_app(up: Deployment, name: str, app: Path, output: Path, actors: int) -> str:
    federation = f"num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus={actors}"
    up.run(name, app, ("--federation-config", federation), output=output, deadline=300, wait=300, **SETTINGS)
    return up.finish(name, 500)


def test_simulation_has_the_bits_of_one_process(simulation: Deployment, tmp_path: Path) -> None:
    output = run_app(simulation, "first", APP, tmp_path / "flower", actors=2)
    reference = execute(make_config(SETTINGS), tmp_path / "reference", lambda progress: None, lambda line: None)
    assert summary_of(tmp_path / "flower")["weights"] == reference["weights"], output
    for name in ("ledger.jsonl", "gradip.jsonl"):
        assert (tmp_path / "flower" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    print("\n".join(line for line in output.splitlines() if "answers in" in line))


def test_flowers_strategy_saves_the_servers_model(simulation: Deployment, tmp_path: Path) -> None:
    app = shutil.copytree(APP, tmp_path / "app")
    project = (app / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(
        project.replace("meerkat_flower.server_app:app", "meerkat_flower.stock_server_app:app")
    )
    output = run_app(simulation, "stock", app, tmp_path / "model", actors=1)
    assert (tmp_path / "model").is_dir(), output
    assert output.count("Received 3 results and 0 failures") == SETTINGS["rounds"]
    assert f"weights {fingerprint(load_model(str(tmp_path / 'model')).model)}" in output
    print("\n".join(line for line in output.splitlines() if "MetricRecord" in line or "finished in" in line))
