"""A run whose clients are elsewhere: only messages reach them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.fed import Client, ClientData, RemotePool, Replica, execute, make_config, resume
from meerkat_engine.fed.server import RoundFailedError
from meerkat_engine.fed.setup.data import client_shares, encode
from meerkat_engine.fed.setup.mask import make_mask
from meerkat_engine.fed.setup.model import load_language_model
from meerkat_engine.fed.setup.server_and_clients import make_terms

from helpers.command import call, metrics_of

SETTINGS = {"clients": 3, "rounds": 4, "local_steps": 2, "eval_examples": 50, "method": "meerkat-vp", "vp_steps": 6,
            "vp_initial": 2, "vp_later": 3, "vp_rho_later": 0.1, "vp_rho_quie": 0.1, "vp_sigma": 10.0}  # fmt: skip


def far_away(settings: dict[str, Any]) -> dict[int, Client]:
    """The clients of a run, with nothing in common with whoever serves them."""
    config = make_config(settings)
    clients = {}
    for i in range(config.clients.count):
        lm = load_language_model(config)
        data = encode(config, lm.tokenizer)
        mask = make_mask(config, lm)
        mine = ClientData(
            data.train, client_shares(config, data)[i], config.step.batch_size, stream.derived_seed(0, "data", i)
        )
        clients[i] = Client(i, mine, Replica(lm.model, mask, make_terms(config, mask)), config.step.objective)
    return clients


def run_of(path: Path, exchange: Any = None) -> dict[str, Any]:
    go = resume if path.exists() else lambda path, *rest, **named: execute(make_config(SETTINGS), path, *rest, **named)
    return go(path, lambda progress: None, lambda line: None, pool=None if exchange is None else RemotePool(exchange))


def test_a_run_over_an_exchange_has_the_bits_of_one_in_process(tmp_path: Path) -> None:
    here = run_of(tmp_path / "here")
    clients = far_away(SETTINGS)
    refuse_from = 3  # then nobody answers, and the run is gone on with

    def exchange(requests: Iterable[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        asked = list(requests)
        rounds.append([i for i, _ in asked])
        if len(rounds) == refuse_from:
            return []
        return [(i, clients[i].handle(request)) for i, request in reversed(asked)]

    rounds: list[list[int]] = []
    with pytest.raises(RoundFailedError, match="round 2: no client gave a usable answer"):
        run_of(tmp_path / "there", exchange)
    there = run_of(tmp_path / "there", exchange)
    assert rounds == [[0, 1, 2]] * 6
    for name in ("config.toml", "ledger.jsonl", "gradip.jsonl"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    assert there["weights"] == here["weights"]
    assert there["stopped"] == here["stopped"] == [0, 1, 2]
    assert "precision" in here
    assert here.keys() - there.keys() == {
        "partition", "examples_by_client_and_label", "precision", "recall", "single_label_clients",
    }  # fmt: skip
    assert metrics_of(tmp_path / "there")[-1]["summary"]["weights"] == there["weights"]
    assert call("run", "--resume", tmp_path / "there").exit_code == 0
    assert call("report", tmp_path / "there").exit_code == 0
    assert "the same bits as at the end of the run" in call("replay", tmp_path / "there").output


def test_attackers_are_simulated(tmp_path: Path) -> None:
    config = make_config(SETTINGS | {"attack": "scale", "attackers": 1})
    with pytest.raises(ConfigError, match="attackers are simulated clients"):
        execute(
            config, tmp_path / "run", lambda progress: None, lambda line: None, pool=RemotePool(lambda requests: [])
        )
    assert not (tmp_path / "run").exists()
