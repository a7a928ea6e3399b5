"""The real thing on loopback: a SuperLink with TLS, three SuperNodes with keys, `flwr run`, the embedded model."""

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
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Flower's, of what it imports
    pytest.mark.timeout(600),
]
SETTINGS = {"clients": 3, "rounds": 4, "local_steps": 2, "eval_every": 1, "partition": "dirichlet", "seed": 5}


def in_process(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The same run with all clients in this process."""
    torch.set_num_threads(1)  # as in the workers; the conftest puts it back
    return execute(make_config(settings), path, lambda progress: None, lambda line: None)


def rounds_in(run: Path) -> int:
    ledger = run / "ledger.jsonl"
    return max(0, ledger.read_bytes().count(b"\n") - 1) if ledger.exists() else 0


def is_left(run: Path) -> bool:
    """Whether no process writes to a run directory."""
    try:
        with RunDirectory(run):
            return True
    except RunError:
        return False


def answers_follow_from_the_ledger(run: Path, client: int) -> int:
    """Checks that a client's own scalars are those of a replica that stands where the ledger says; how many rounds.

    A scalar is a difference of losses: a client whose masked weights differ in a bit that matters answers otherwise.
    """
    ledger, setup = read_ledger(run / "ledger.jsonl"), describe_run(run, seconds=1)
    participant = LocalRun.prepare(setup.settings, setup.base, setup.mask_digest, setup.mask, {})
    one, checked = participant.client(client), 0
    for line in ledger.rounds:
        one.data.seek((line.round - 1) * participant.config.local_steps)
        found, _ = one.train(line.round, participant.config.local_steps)
        if client in line.clients:
            checked += 1
            assert np.array_equal(found["scalars"], np.array(line.clients[client], dtype=np.float32))
        participant.replica.apply_rounds([line.scalars])
    return checked


def test_same_bits_as_in_one_process_and_strangers_stay_outside(
    three_nodes: Deployment, run_directory: Path, tmp_path: Path
) -> None:
    up = three_nodes
    up.node("stranger", make_keys(up.directory, "stranger"), "client-id=0")
    up.node("trusts-nobody", up.directory / "key0", "client-id=0", certificate=False)
    up.run("first", output=run_directory, deadline=120, **SETTINGS)
    here = in_process(tmp_path / "here", SETTINGS)
    told = up.finish("first", 180)
    there = summary_of(run_directory)
    assert there["weights"] == here["weights"], told
    assert there["mask"] == here["mask"]
    for name in ("ledger.jsonl", "gradip.jsonl"):
        assert (run_directory / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert "the same bits as at the end of the run" in call("replay", run_directory).output
    wait_until(lambda: not workers(up.directory / "rt"), 5, "the workers ended with the run")
    up.processes["stranger"].wait(30)
    assert "SuperNode ID" not in up.log("stranger") + up.log("trusts-nobody")
    assert "Failed to initialize the connection to the SuperLink" in up.log("stranger")
    assert "CERTIFICATE_VERIFY_FAILED" in up.log("trusts-nobody")
    assert "3 answers in" in told
    print("\n".join(line for line in told.splitlines() if "answers in" in line))


def test_a_worker_that_was_killed_is_started_anew_and_catches_up(
    three_nodes: Deployment, run_directory: Path, tmp_path: Path
) -> None:
    up = three_nodes
    before = set(workers(up.directory / "rt"))
    up.run("second", output=run_directory, deadline=120, **SETTINGS)
    wait_until(lambda: rounds_in(run_directory) >= 2, 120, "two rounds are over")
    victim = min(set(workers(up.directory / "rt")) - before)
    os.kill(victim, signal.SIGKILL)
    here = in_process(tmp_path / "here", SETTINGS)
    told = up.finish("second", 180)
    assert summary_of(run_directory)["weights"] == here["weights"], told
    rejected = summary_of(run_directory)["rejected_messages"]
    assert list(rejected.values()) == [1]
    assert next(iter(rejected)).endswith("stands at an earlier round")


def test_a_node_that_never_answers_holds_no_round_past_its_deadline(
    three_nodes: Deployment, run_directory: Path
) -> None:
    up = three_nodes
    before, deadline = set(workers(up.directory / "rt")), 8
    up.run("third", output=run_directory, deadline=deadline, wait=120, **SETTINGS | {"rounds": 12})
    wait_until(lambda: rounds_in(run_directory) >= 2, 120, "two rounds are over")
    victim = max(set(workers(up.directory / "rt")) - before)
    os.kill(victim, signal.SIGSTOP)
    stood, begun = rounds_in(run_directory), time.monotonic()
    wait_until(lambda: rounds_in(run_directory) >= stood + 3, 60, "three rounds more are over")
    assert time.monotonic() - begun < 3 * (deadline + 5)
    os.kill(victim, signal.SIGCONT)
    told = up.finish("third", 240)
    assert f"no answer within {deadline} s from client" in told
    lines = read_ledger(run_directory / "ledger.jsonl").rounds
    missing = {i for line in lines for i in range(3) if i not in line.clients}
    assert len(missing) == 1
    assert set(lines[-1].clients) == {0, 1, 2}
    assert 2 <= answers_follow_from_the_ledger(run_directory, missing.pop()) < 12
    assert "the same bits as at the end of the run" in call("replay", run_directory).output


def test_a_node_that_was_killed_and_restarted_catches_up(three_nodes: Deployment, run_directory: Path) -> None:
    """Flower's SuperLink notices after a minute, and lets it in again; until then rounds go on without it."""
    up = three_nodes
    before = set(workers(up.directory / "rt"))
    up.run("fourth", output=run_directory, deadline=100, **SETTINGS | {"rounds": 40})
    wait_until(lambda: rounds_in(run_directory) >= 2, 120, "two rounds are over")
    up.kill("node1")
    wait_until(lambda: len(set(workers(up.directory / "rt")) - before) == 2, 10, "its worker ended by itself")

    def back() -> bool:
        if "node1" in up.processes and up.processes["node1"].poll() is not None:
            del up.processes["node1"]
        if "node1" not in up.processes:
            up.node("node1", up.directory / "key1", "client-id=1")
        return up.log("node1").count("SuperNode ID") == 2

    wait_until(back, 120, "the SuperLink lets node 1 in again")
    told = up.finish("fourth", 280)
    took_part = [1 in line.clients for line in read_ledger(run_directory / "ledger.jsonl").rounds]
    assert took_part[:2] == [True, True], told
    assert not all(took_part), told
    assert took_part[-1], told
    assert answers_follow_from_the_ledger(run_directory, 1) == sum(took_part)
    assert "the same bits as at the end of the run" in call("replay", run_directory).output


@pytest.mark.parametrize("database", [True, False])
def test_a_superlink_that_was_killed_and_started_again_has_the_run_gone_on_with(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, database: bool
) -> None:
    """With its database the nodes stay; without, their keys are registered again and they are started again."""
    run, settings = tmp_path / "there", SETTINGS | {"rounds": 20}
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
                up.processes.pop(f"node{i}").wait(60)  # it is known no more
                up.node(f"node{i}", directory / f"key{i}", f"client-id={i}")
        wait_until(lambda: is_left(run), 60, "the ServerApp has noticed that its run is over")
        up.run("after", output=run, deadline=60, wait=120, **settings)
        told = up.finish("after", 240)
    here = in_process(tmp_path / "here", settings)
    assert "going on after round" in told
    assert summary_of(run)["weights"] == here["weights"], told
    lines, same = (read_ledger(each / "ledger.jsonl").rounds for each in (run, tmp_path / "here"))
    assert [line.clients for line in lines] == [line.clients for line in same]  # catching up, nodes were sent more
