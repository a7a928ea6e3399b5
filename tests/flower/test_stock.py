"""Flower's own strategies and privacy wrappers over this engine's client: the real strategies, the real ClientApp."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, MetricRecord
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower

from meerkat_engine.errors import ConfigError
from meerkat_engine.fed import execute, make_config, read_ledger
from meerkat_engine.fed.flower import client_app, participant, strategies
from meerkat_engine.fed.flower.strategies import Trained, start_strategy
from meerkat_engine.fed.setup import encode
from meerkat_engine.parameters import fingerprint

from .nodes import LocalGrid, Node

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CLIENTS = 4
SETTINGS: dict[str, Any] = {"clients": CLIENTS, "rounds": 6, "local_steps": 4, "queries": 2, "eval_examples": 100,
                            "seed": 3, "calibration_texts": 32}  # fmt: skip
PLAIN: dict[str, Any] = {"fraction_evaluate": 0.0, "min_train_nodes": CLIENTS, "min_available_nodes": CLIENTS}


@pytest.fixture(autouse=True)
def encode_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples are the same tokens in all of these tests."""
    for module in (participant, strategies):
        monkeypatch.setattr(module, "encode", _encoded)


_ENCODED: list[Any] = []


def _encoded(config: Any, tokenizer: Any) -> Any:
    if not _ENCODED:
        _ENCODED.append(encode(config, tokenizer))
    return _ENCODED[0]


def app_with(*mods: Any) -> ClientApp:
    """As a user writes it whose strategy needs a mod on the client's side."""
    app = ClientApp()
    app.query("meerkat")(client_app.introduce)
    app.train(mods=list(mods))(client_app.train_for_any_strategy)
    return app


def started(patch: pytest.MonkeyPatch, strategy: Any, *mods: Any, **settings: Any) -> tuple[Trained, LocalGrid]:
    app = app_with(*mods) if mods else client_app.app
    grid = LocalGrid([Node.numbered(i) for i in range(CLIENTS)], app, patch)
    return start_strategy(grid, strategy, SETTINGS | settings, lambda line: None, wait=30), grid


def nodes_follow(trained: Trained, grid: LocalGrid) -> None:
    """Every node's model gets the bits of the server's as soon as it is sent the last sums."""
    for node in grid.nodes.values():
        held = node.resident._participant
        assert held is not None
        held.replica.catch_up(1, trained.scalars.reshape(-1))
        assert fingerprint(held.replica.model) == trained.weights


def wrapped(kind: Any, **named: Any) -> Any:
    return kind(flower.FedAvg(**PLAIN), num_sampled_clients=CLIENTS, **named)


STRATEGIES: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
    "FedAvg": (lambda: flower.FedAvg(**PLAIN), ()),
    "FedMedian": (lambda: flower.FedMedian(**PLAIN), ()),
    "FedTrimmedAvg": (lambda: flower.FedTrimmedAvg(beta=0.25, **PLAIN), ()),
    "Krum": (lambda: flower.Krum(num_malicious_nodes=1, **PLAIN), ()),
    "MultiKrum": (lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2, **PLAIN), ()),
    "Bulyan": (lambda: flower.Bulyan(num_malicious_nodes=0, **PLAIN), ()),
    "FedProx": (lambda: flower.FedProx(proximal_mu=0.0, **PLAIN), ()),
    "QFedAvg": (lambda: flower.QFedAvg(client_learning_rate=1.0, train_loss_key="loss", **PLAIN), ()),
    "FedAvgM": (lambda: flower.FedAvgM(server_learning_rate=0.5, **PLAIN), ()),
    "FedAdagrad": (lambda: flower.FedAdagrad(eta=1.0, **PLAIN), ()),
    "FedAdam": (lambda: flower.FedAdam(eta=1.0, beta_1=0.0, **PLAIN), ()),
    "FedYogi": (lambda: flower.FedYogi(eta=1.0, beta_1=0.0, **PLAIN), ()),
    "DP, server clips": (
        lambda: wrapped(
            flower.DifferentialPrivacyServerSideFixedClipping, noise_multiplier=0.05, clipping_norm=2.0
        ),
        (),
    ),
    "DP, server clips adaptively": (
        lambda: wrapped(
            flower.DifferentialPrivacyServerSideAdaptiveClipping, noise_multiplier=0.05, initial_clipping_norm=2.0
        ),
        (),
    ),
    "DP, clients clip": (
        lambda: wrapped(
            flower.DifferentialPrivacyClientSideFixedClipping, noise_multiplier=0.05, clipping_norm=2.0
        ),
        (fixedclipping_mod,),
    ),
    "DP, clients clip adaptively": (
        lambda: wrapped(
            flower.DifferentialPrivacyClientSideAdaptiveClipping, noise_multiplier=0.05, initial_clipping_norm=2.0
        ),
        (adaptiveclipping_mod,),
    ),
    "local DP": (lambda: flower.FedAvg(**PLAIN), (LocalDpMod(2.0, 0.01, 1.0, 1e-5),)),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_trains_and_all_nodes_follow(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made, mods = STRATEGIES[name]
    trained, grid = started(monkeypatch, made(), *mods)
    metrics = trained.result.evaluate_metrics_serverapp
    before, after = (float(str(metrics[round]["loss"])) for round in (0, SETTINGS["rounds"]))
    print(f"{name}: loss {before:.4f} -> {after:.4f}, accuracy {metrics[SETTINGS['rounds']]['accuracy']:.3f}")
    assert grid.errors == []
    assert trained.scalars.shape == (SETTINGS["rounds"], 8)
    assert np.all(np.any(trained.scalars != 0, axis=1))
    assert after < before
    nodes_follow(trained, grid)
