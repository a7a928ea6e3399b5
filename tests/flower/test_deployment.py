"""Deployments on loopback: a SuperLink with TLS, three SuperNodes with keys, `flwr run`, the embedded model."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meerkat_engine.engine.errors import RunError
from meerkat_engine.fed import execute, make_config, read_ledger
from meerkat_engine.fed.flower.node.local_run import LocalRun
from meerkat_engine.fed.flower.server.run import describe_run
from meerkat_engine.fed.run.directory import RunDirectory

from helpers.command import call, summary_of
from helpers.deployment import Deployment, deployment, make_keys, wait_until, workers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # from modules that Flower imports
    pytest.mark.timeout(600),
]
SETTINGS = {"clients": 3, "rounds": 4, "local_steps": 2, "eval_every": 1, "partition": "dirichlet", "seed": 5}


def run_in_process(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs the same federation with all clients in this process; returns its summary."""
    torch.set_num_threads(1)  # as in the workers; a fixture restores it
    return execute(make_config(settings), path, lambda progress: None, lambda line: None)


def rounds_in(run: Path) -> int:
    """Number of rounds in a run's ledger."""
    ledger = run / "ledger.jsonl"
    return max(0, ledger.read_bytes().count(b"\n") - 1) if ledger.exists() else 0


def is_unlocked(run: Path) -> bool:
    """Whether no process holds the lock of a run directory."""
    try:
        with RunDirectory(run):
            return True
    except RunError:
        return False


def check_answers(run: Path, client: int) -> int:
    """Checks that a client's scalars are those of a replica at the ledger's rounds; returns the number of rounds.

    A scalar follows from a difference of losses: the answers of a client whose masked weights differ would differ.
    """
    ledger, description = read_ledger(run / "ledger.jsonl"), describe_run(run, seconds=1)
    local_run = LocalRun.prepare(description.settings, description.base, description.mask_digest, description.mask, {})
    replayed, checked = local_run.client(client), 0
    for line in ledger.rounds:
        replayed.data.seek((line.round - 1) * local_run.config.local_steps)
        update, _ = replayed.train(line.round, local_run.config.local_steps)
        if client in line.clients:
            checked += 1
            assert np.array_equal(update["scalars"], np.array(line.clients[client], dtype=np.float32))
        local_run.replica.apply_rounds([line.scalars])
    return checked


def test_deployment_has_the_bits_of_one_process_and_rejects_strangers(
    three_nodes: Deployment, run_directory: Path, tmp_path: Path
) -> None:
    up = three_nodes
    up.node("stranger", make_keys(up.directory, "stranger"), "client-id=0")
    up.node("without-certificate", up.directory / "key0", "client-id=0", certificate=False)
    up.run("first", output=run_directory, deadline=120, **SETTINGS)
    reference = run_in_process(tmp_path / "reference", SETTINGS)
    output = up.finish("first", 180)
    summary = summary_of(run_directory)
    assert summary["weights"] == reference["weights"], output
    assert summary["mask"] == reference["mask"]
    for name in ("ledger.jsonl", "gradip.jsonl"):
        assert (run_directory / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    assert "the same bits as at the end of the run" in call("replay", run_directory).output
    wait_until(lambda: not workers(up.directory / "rt"), 5, "the workers ended with the run")
    up.processes["stranger"].wait(30)
    assert "SuperNode ID" not in up.log("stranger") + up.log("without-certificate")
    assert "Failed to initialize the connection to the SuperLink" in up.log("stranger")
    assert "CERTIFICATE_VERIFY_FAILED" in up.log("without-certificate")
    assert "3 answers in" in output
    print("\n".join(line for line in output.splitlines() if "answers in" in line))


def test_killed_worker_is_restarted_and_catches_up(
    three_nodes: Deployment, run_directory: Path, tmp_path: Path
) -> None:
    up = three_nodes
    before = set(workers(up.directory / "rt"))
    up.run("second", output=run_directory, deadline=120, **SETTINGS)
    wait_until(lambda: rounds_in(run_directory) >= 2, 120, "two rounds are over")
    victim = min(set(workers(up.directory / "rt")) - before)
    os.kill(victim, signal.SIGKILL)
    reference = run_in_process(tmp_path / "reference", SETTINGS)
    output = up.finish("second", 180)
    assert summary_of(run_directory)["weights"] == reference["weights"], output
    rejected = summary_of(run_directory)["rejected_messages"]
    assert list(rejected.values()) == [1]
    assert next(iter(rejected)).endswith("is at an earlier round")


def test_silent_node_delays_a_round_to_its_deadline_at_most(three_nodes: Deployment, run_directory: Path) -> None:
    up = three_nodes
    before, deadline = set(workers(up.directory / "rt")), 8
    up.run("third", output=run_directory, deadline=deadline, wait=120, **SETTINGS | {"rounds": 12})
    wait_until(lambda: rounds_in(run_directory) >= 2, 120, "two rounds are over")
    victim = max(set(workers(up.directory / "rt")) - before)
    os.kill(victim, signal.SIGSTOP)
    finished, begun = rounds_in(run_directory), time.monotonic()
    wait_until(lambda: rounds_in(run_directory) >= finished + 3, 60, "three more rounds are over")
    assert time.monotonic() - begun < 3 * (deadline + 5)
    os.kill(victim, signal.SIGCONT)
    output = up.finish("third", 240)
    assert f"no answer within {deadline} s from client" in output
    lines = read_ledger(run_directory / "ledger.jsonl").rounds
    missing = {i for line in lines for i in range(3) if i not in line.clients}
    assert len(missing) == 1
    assert set(lines[-1].clients) == {0, 1, 2}
    assert 2 <= check_answers(run_directory, missing.pop()) < 12
    assert "the same bits as at the end of the run" in call("replay", run_directory).output


def test_killed_and_restarted_node_catches_up(three_nodes: Deployment, run_directory: Path) -> None:
    """Flower's SuperLink notices after a minute, then admits it again; until then the rounds run without it."""
    up = three_nodes
    before = set(workers(up.directory / "rt"))
    up.run("fourth", output=run_directory, deadline=100, **SETTINGS | {"rounds": 40})
    wait_until(lambda: rounds_in(run_directory) >= 2, 120, "two rounds are over")
    up.kill("node1")
    wait_until(lambda: len(set(workers(up.directory / "rt")) - before) == 2, 10, "its worker ended with it")

    def is_back() -> bool:
        if "node1" in up.processes and up.processes["node1"].poll() is not None:
            del up.processes["node1"]
        if "node1" not in up.processes:
            up.node("node1", up.directory / "key1", "client-id=1")
        return up.log("node1").count("SuperNode ID") == 2

    wait_until(is_back, 120, "the SuperLink admits node 1 again")
    output = up.finish("fourth", 280)
    took_part = [1 in line.clients for line in read_ledger(run_directory / "ledger.jsonl").rounds]
    assert took_part[:2] == [True, True], output
    assert not all(took_part), output
    assert took_part[-1], output
    assert check_answers(run_directory, 1) == sum(took_part)
    assert "the same bits as at the end of the run" in call("replay", run_directory).output


@pytest.mark.parametrize("database", [True, False])
def test_run_is_resumed_after_its_superlink_was_killed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, database: bool
) -> None:
    """With a database the nodes stay; without one, their keys are registered again and they are restarted."""
    run, settings = tmp_path / "flower", SETTINGS | {"rounds": 20}
    directory = tmp_path_factory.mktemp("flower")
    with deployment(directory, database=database) as up:
        up.three_nodes()
        up.run("before", output=run, deadline=60, wait=120, **settings)
        wait_until(lambda: rounds_in(run) >= 2, 120, "two rounds are over")
        up.kill("superlink")
        up.processes.pop("before").wait(60)
        assert 2 <= rounds_in(run) < 20
        up.superlink()
        if not database:
            for i in range(3):
                up.register(directory / f"key{i}")
                up.processes.pop(f"node{i}").wait(60)  # it ends: the SuperLink no longer has its key
                up.node(f"node{i}", directory / f"key{i}", f"client-id={i}")
        wait_until(lambda: is_unlocked(run), 60, "the ServerApp has noticed that its run is over")
        up.run("after", output=run, deadline=60, wait=120, **settings)
        output = up.finish("after", 240)
    reference = run_in_process(tmp_path / "reference", settings)
    assert "resuming after round" in output
    assert summary_of(run)["weights"] == reference["weights"], output
    rounds, expected = (read_ledger(path / "ledger.jsonl").rounds for path in (run, tmp_path / "reference"))
    # bytes differ: nodes that catch up are sent more
    assert [line.clients for line in rounds] == [line.clients for line in expected]
