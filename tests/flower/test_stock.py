"""Flower's own strategies and privacy wrappers over this engine's client: the real strategies, the real ClientApp."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower
from flwr.supercore.differential_privacy import compute_clip_model_update

from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.fed import Client, execute, make_config, read_ledger
from meerkat_engine.fed.flower.node import app as client_app
from meerkat_engine.fed.flower.node import local_run as participant
from meerkat_engine.fed.flower.node.handler import RequestHandler
from meerkat_engine.fed.flower.server import strategy as strategies
from meerkat_engine.fed.flower.server.strategy import Trained, start_strategy
from meerkat_engine.fed.setup.data import encode

from helpers.nodes import LocalGrid, Node

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
    app.query("meerkat_end")(client_app.leave)
    app.train(mods=list(mods))(client_app.train_for_any_strategy)
    return app


def started(patch: pytest.MonkeyPatch, strategy: Any, *mods: Any, **settings: Any) -> tuple[Trained, LocalGrid]:
    app = app_with(*mods) if mods else client_app.app
    grid = LocalGrid([Node.numbered(i) for i in range(CLIENTS)], app, patch)
    return start_strategy(grid, strategy, SETTINGS | settings, lambda line: None, wait=30), grid


def nodes_follow(trained: Trained, grid: LocalGrid) -> None:
    """Every node's model gets the bits of the server's as soon as it is sent the last sums."""
    for node in grid.nodes.values():
        assert node.ended
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
        lambda: wrapped(flower.DifferentialPrivacyServerSideFixedClipping, noise_multiplier=0.05, clipping_norm=2.0),
        (),
    ),
    "DP, server clips adaptively": (
        lambda: wrapped(
            flower.DifferentialPrivacyServerSideAdaptiveClipping, noise_multiplier=0.05, initial_clipping_norm=2.0
        ),
        (),
    ),
    "DP, clients clip": (
        lambda: wrapped(flower.DifferentialPrivacyClientSideFixedClipping, noise_multiplier=0.05, clipping_norm=2.0),
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


# Those that are run each time; the others are slow together.
_QUICK = {"FedAvg", "FedTrimmedAvg", "DP, server clips", "DP, clients clip"}


@pytest.mark.parametrize("name", [pytest.param(i, marks=() if i in _QUICK else pytest.mark.slow) for i in STRATEGIES])
def test_a_strategy_trains_and_all_nodes_follow(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made, mods = STRATEGIES[name]
    monkeypatch.setattr(np.random, "normal", np.random.Generator(np.random.PCG64(1)).normal)  # the wrappers' noise
    trained, grid = started(monkeypatch, made(), *mods)
    metrics = trained.result.evaluate_metrics_serverapp
    before, after = (float(str(metrics[round]["loss"])) for round in (0, SETTINGS["rounds"]))
    print(f"{name}: loss {before:.4f} -> {after:.4f}, accuracy {metrics[SETTINGS['rounds']]['accuracy']:.3f}")
    assert grid.errors == []
    assert trained.scalars.shape == (SETTINGS["rounds"], 8)
    assert np.all(np.any(trained.scalars != 0, axis=1))
    assert after < before
    nodes_follow(trained, grid)


def test_a_median_has_the_bits_of_this_engines_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained, _ = started(monkeypatch, flower.FedMedian(**PLAIN), rounds=4)
    settings = SETTINGS | {"aggregation": "median", "rounds": 4}
    own = execute(make_config(settings), tmp_path / "own", lambda progress: None, lambda line: None)
    lines = read_ledger(tmp_path / "own" / "ledger.jsonl").rounds
    assert np.array_equal(trained.scalars, np.array([line.scalars for line in lines], dtype=np.float32))
    assert trained.weights == own["weights"]


def test_a_node_that_missed_a_round_says_so_and_the_rest_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deafening(flower.FedMedian):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any) -> Any:
            grid.deaf = {102} if server_round == 2 else set()
            return super().configure_train(server_round, arrays, config, grid)

    trained, grid = started(monkeypatch, Deafening(**PLAIN), rounds=4)
    assert grid.errors == [
        "round 3 came after round 1: a node that missed a round cannot follow",
        "round 4 came after round 1: a node that missed a round cannot follow",
    ]
    assert np.all(np.any(trained.scalars != 0, axis=1))


def test_a_worker_that_was_started_anew_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower keeps of the node is enough; the model is not lost with the process that held it."""

    class Killing(flower.FedMedian):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any) -> Any:
            if server_round == 3:
                grid.nodes[101].resident = RequestHandler()
            return super().configure_train(server_round, arrays, config, grid)

    undisturbed, _ = started(monkeypatch, flower.FedMedian(**PLAIN), rounds=4)
    trained, grid = started(monkeypatch, Killing(**PLAIN), rounds=4)
    assert grid.errors == []
    assert trained.weights == undisturbed.weights
    nodes_follow(trained, grid)


def test_a_strategy_started_again_over_nodes_that_are_past_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first, grid = started(monkeypatch, flower.FedAvg(**PLAIN), rounds=2)
    again = start_strategy(grid, flower.FedAvg(**PLAIN), SETTINGS | {"rounds": 2}, lambda line: None, wait=30)
    assert grid.errors == []
    assert again.weights == first.weights
    nodes_follow(again, grid)


def test_a_node_whose_losses_are_not_finite_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model stays with the others'."""
    made = Client.train

    def train(client: Client, round: int, steps: int) -> Any:
        found, loss = made(client, round, steps)
        if client.id == 1 and round == 2:
            return {"scalars": np.full_like(found["scalars"], np.nan)}, None
        return found, loss

    monkeypatch.setattr(Client, "train", train)
    trained, grid = started(monkeypatch, flower.FedMedian(**PLAIN), rounds=3)
    assert grid.errors == ["client 1 took no step of round 2: no loss was finite"]
    nodes_follow(trained, grid)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "meerkat-vp"},
        {"method": "fedavg", "queries": 1},
        {"dp_noise": 1.0, "dp_clip": 1.0},
        {"clients_per_round": 2},
    ],
)
def test_what_needs_this_engines_own_server(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"own server|every client takes part"):
        started(monkeypatch, flower.FedAvg(**PLAIN), **settings)


def test_wrappers_cannot_clip_an_update_of_nothing() -> None:
    """Flower divides by its norm; were it mended, docs/distributed.md would have to say so."""
    with pytest.raises(ZeroDivisionError):
        compute_clip_model_update([np.zeros(8)], [np.zeros(8)], 1.0)
