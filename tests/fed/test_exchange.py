"""Runs over a transport: server and clients share nothing but messages."""

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


def independent_clients(settings: dict[str, Any]) -> dict[int, Client]:
    """The clients of a run, each with its own model, data and mask; nothing is shared with the server."""
    config = make_config(settings)
    clients = {}
    for i in range(config.clients.count):
        lm = load_language_model(config)
        data = encode(config, lm)
        mask = make_mask(config, lm)
        own_data = ClientData(
            data.train, client_shares(config, data)[i], config.step.batch_size, stream.derived_seed(0, "data", i)
        )
        clients[i] = Client(i, own_data, Replica(lm.model, mask, make_terms(config, mask)), config.objective)
    return clients


def start_or_resume(path: Path, exchange: Any = None) -> dict[str, Any]:
    """Starts a run, or resumes it if its directory exists; over the exchange, or in this process if that is None."""
    pool = None if exchange is None else RemotePool(exchange)
    if path.exists():
        return resume(path, lambda progress: None, lambda line: None, pool=pool)
    return execute(make_config(SETTINGS), path, lambda progress: None, lambda line: None, pool=pool)


def test_a_run_over_an_exchange_has_the_bits_of_one_in_process(tmp_path: Path) -> None:
    local = start_or_resume(tmp_path / "local")
    clients = independent_clients(SETTINGS)
    silent_exchange = 3  # no client answers the third exchange; the run fails and is resumed

    def exchange(requests: Iterable[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        sent = list(requests)
        exchanges.append([i for i, _ in sent])
        if len(exchanges) == silent_exchange:
            return []
        return [(i, clients[i].handle(request)) for i, request in reversed(sent)]

    exchanges: list[list[int]] = []
    with pytest.raises(RoundFailedError, match="round 2: no client sent a usable answer"):
        start_or_resume(tmp_path / "remote", exchange)
    remote = start_or_resume(tmp_path / "remote", exchange)
    assert exchanges == [[0, 1, 2]] * 6
    for name in ("config.toml", "ledger.jsonl", "gradip.jsonl"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes()
    assert remote["weights"] == local["weights"]
    assert remote["stopped"] == local["stopped"] == [0, 1, 2]
    assert "precision" in local
    assert local.keys() - remote.keys() == {
        "partition", "examples_by_client_and_label", "precision", "recall", "single_label_clients",
        "client_accuracy", "client_accuracy_mean", "client_accuracy_worst", "client_accuracy_stopped",
    }  # fmt: skip
    assert metrics_of(tmp_path / "remote")[-1]["summary"]["weights"] == remote["weights"]
    assert call("run", "--resume", tmp_path / "remote").exit_code == 0
    assert call("report", tmp_path / "remote").exit_code == 0
    assert "the same bits as at the end of the run" in call("replay", tmp_path / "remote").output


def test_attackers_need_simulated_clients(tmp_path: Path) -> None:
    config = make_config(SETTINGS | {"attack": "scale", "attackers": 1})
    with pytest.raises(ConfigError, match="attackers are simulated clients"):
        execute(
            config, tmp_path / "run", lambda progress: None, lambda line: None, pool=RemotePool(lambda requests: [])
        )
    assert not (tmp_path / "run").exists()
