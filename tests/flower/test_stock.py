"""Flower's own strategies and privacy wrappers over this engine's clients, with the real ClientApp."""

import json
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
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.hub import HubSource
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.fed import Client, execute, make_config, read_ledger
from meerkat_engine.fed.flower.node import app as client_app
from meerkat_engine.fed.flower.node import local_run
from meerkat_engine.fed.flower.node.handler import RequestHandler
from meerkat_engine.fed.flower.server import strategy as server_strategy
from meerkat_engine.fed.flower.server.strategy import StrategyResult, start_strategy
from meerkat_engine.fed.setup.data import encode

from helpers.nodes import LocalGrid, Node

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CLIENTS = 4
SETTINGS: dict[str, Any] = {"clients": CLIENTS, "rounds": 6, "local_steps": 4, "queries": 2, "eval_examples": 100,
                            "seed": 3, "calibration_texts": 32}  # fmt: skip
PLAIN: dict[str, Any] = {"fraction_evaluate": 0.0, "min_train_nodes": CLIENTS, "min_available_nodes": CLIENTS}


@pytest.fixture(autouse=True)
def encode_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encodes the examples of a task once: most of these tests use the same."""
    for module in (local_run, server_strategy):
        monkeypatch.setattr(module, "encode", _encode_once)


_ENCODED: dict[Any, Any] = {}


def _encode_once(config: Any, tokenizer: Any) -> Any:
    if config.data not in _ENCODED:
        _ENCODED[config.data] = encode(config, tokenizer)
    return _ENCODED[config.data]


def app_with(*mods: Any) -> ClientApp:
    """A ClientApp as a user writes it for a strategy that needs mods on the client's side."""
    app = ClientApp()
    app.query("meerkat")(client_app.register)
    app.query("meerkat_end")(client_app.release)
    app.train(mods=list(mods))(client_app.train_for_any_strategy)
    return app


def run_strategy(
    patch: pytest.MonkeyPatch, strategy: Any, *mods: Any, **settings: Any
) -> tuple[StrategyResult, LocalGrid]:
    app = app_with(*mods) if mods else client_app.app
    grid = LocalGrid([Node.numbered(i) for i in range(CLIENTS)], app, patch)
    return start_strategy(grid, strategy, SETTINGS | settings, lambda line: None, wait=30), grid


def check_models_of_nodes(trained: StrategyResult, grid: LocalGrid) -> None:
    """Checks that every node's model has the server's bits once it has applied the last scalars."""
    for node in grid.nodes.values():
        assert node.ended
        node_run = node.handler._local_run
        assert node_run is not None
        node_run.replica.catch_up(1, trained.scalars.reshape(-1))
        assert fingerprint(node_run.replica.model) == trained.weights


def wrap_fedavg(kind: Any, **named: Any) -> Any:
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
        lambda: wrap_fedavg(
            flower.DifferentialPrivacyServerSideFixedClipping, noise_multiplier=0.05, clipping_norm=2.0
        ),
        (),
    ),
    "DP, server clips adaptively": (
        lambda: wrap_fedavg(
            flower.DifferentialPrivacyServerSideAdaptiveClipping, noise_multiplier=0.05, initial_clipping_norm=2.0
        ),
        (),
    ),
    "DP, clients clip": (
        lambda: wrap_fedavg(
            flower.DifferentialPrivacyClientSideFixedClipping, noise_multiplier=0.05, clipping_norm=2.0
        ),
        (fixedclipping_mod,),
    ),
    "DP, clients clip adaptively": (
        lambda: wrap_fedavg(
            flower.DifferentialPrivacyClientSideAdaptiveClipping, noise_multiplier=0.05, initial_clipping_norm=2.0
        ),
        (adaptiveclipping_mod,),
    ),
    "local DP": (lambda: flower.FedAvg(**PLAIN), (LocalDpMod(2.0, 0.01, 1.0, 1e-5),)),
}


# Strategies that are tested each time; all others are marked slow.
_QUICK = {"FedAvg", "FedTrimmedAvg", "DP, server clips", "DP, clients clip"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in STRATEGIES]
)
def test_strategy_trains_and_all_nodes_get_the_servers_bits(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make_strategy, mods = STRATEGIES[name]
    monkeypatch.setattr(np.random, "normal", np.random.Generator(np.random.PCG64(1)).normal)  # the wrappers' noise
    trained, grid = run_strategy(monkeypatch, make_strategy(), *mods)
    metrics = trained.result.evaluate_metrics_serverapp
    before, after = (float(str(metrics[round]["loss"])) for round in (0, SETTINGS["rounds"]))
    print(f"{name}: loss {before:.4f} -> {after:.4f}, accuracy {metrics[SETTINGS['rounds']]['accuracy']:.3f}")
    assert grid.errors == []
    assert trained.scalars.shape == (SETTINGS["rounds"], 8)
    assert np.all(np.any(trained.scalars != 0, axis=1))
    assert after < before
    check_models_of_nodes(trained, grid)


def test_fedmedian_has_the_bits_of_this_engines_median(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained, _ = run_strategy(monkeypatch, flower.FedMedian(**PLAIN), rounds=4)
    settings = SETTINGS | {"aggregation": "median", "rounds": 4}
    own = execute(make_config(settings), tmp_path / "own", lambda progress: None, lambda line: None)
    lines = read_ledger(tmp_path / "own" / "ledger.jsonl").rounds
    assert np.array_equal(trained.scalars, np.array([line.scalars for line in lines], dtype=np.float32))
    assert trained.weights == own["weights"]


def test_node_that_missed_a_round_answers_with_an_error_and_the_others_continue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Deafening(flower.FedMedian):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any) -> Any:
            grid.deaf = {102} if server_round == 2 else set()
            return super().configure_train(server_round, arrays, config, grid)

    trained, grid = run_strategy(monkeypatch, Deafening(**PLAIN), rounds=4)
    assert grid.errors == [
        "round 3 came after round 1: a node that missed a round cannot follow",
        "round 4 came after round 1: a node that missed a round cannot follow",
    ]
    assert np.all(np.any(trained.scalars != 0, axis=1))


def test_restarted_worker_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums in the state that Flower keeps of the node are enough to rebuild the model."""

    class Killing(flower.FedMedian):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any) -> Any:
            if server_round == 3:
                grid.nodes[101].handler = RequestHandler()
            return super().configure_train(server_round, arrays, config, grid)

    undisturbed, _ = run_strategy(monkeypatch, flower.FedMedian(**PLAIN), rounds=4)
    trained, grid = run_strategy(monkeypatch, Killing(**PLAIN), rounds=4)
    assert grid.errors == []
    assert trained.weights == undisturbed.weights
    check_models_of_nodes(trained, grid)


def test_strategy_restarts_over_nodes_that_are_past_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first, grid = run_strategy(monkeypatch, flower.FedAvg(**PLAIN), rounds=2)
    again = start_strategy(grid, flower.FedAvg(**PLAIN), SETTINGS | {"rounds": 2}, lambda line: None, wait=30)
    assert grid.errors == []
    assert again.weights == first.weights
    check_models_of_nodes(again, grid)


def test_node_without_a_finite_loss_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model still gets the bits of the others."""
    original_train = Client.train

    def train(client: Client, round: int, steps: int) -> Any:
        update, loss = original_train(client, round, steps)
        if client.id == 1 and round == 2:
            return {"scalars": np.full_like(update["scalars"], np.nan)}, None
        return update, loss

    monkeypatch.setattr(Client, "train", train)
    trained, grid = run_strategy(monkeypatch, flower.FedMedian(**PLAIN), rounds=3)
    assert grid.errors == ["client 1 skipped every step of round 2: no loss was finite"]
    check_models_of_nodes(trained, grid)


@pytest.mark.parametrize("labels", [{}, {"template": "{prompt}", "labels": "lovely,cold", "label_field": "label"}])
@pytest.mark.parametrize("on_hub", [False, True])
def test_strategy_trains_on_own_data(
    on_hub: bool, labels: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free text and label words; a file of each node, and the nodes' shares of a data set on the hub."""
    rows = [
        {"prompt": "i found the staff", "completion": f" {('lovely', 'cold')[i % 2]}", "label": i % 2}
        for i in range(80)
    ]
    monkeypatch.setattr(HubSource, "rows", lambda *arguments: iter(rows))
    nodes = [Node.numbered(i) for i in range(CLIENTS)]
    own: dict[str, Any] = {"dataset": "me/data"}
    if not on_hub:
        own = {"data": str(tmp_path / "server.jsonl")}
        for i, path in enumerate((own["data"], *(str(tmp_path / f"{i}.jsonl") for i in range(CLIENTS)))):
            Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows[i : i + 60]))
        for i, node in enumerate(nodes):
            node.context.node_config["data"] = str(tmp_path / f"{i}.jsonl")
    grid = LocalGrid(nodes, client_app.app, monkeypatch)
    settings = SETTINGS | own | labels | {"model": embedded.NAME, "rounds": 2, "partition": "iid"}
    trained = start_strategy(grid, flower.FedAvg(**PLAIN), settings, lambda line: None, wait=30)
    assert grid.errors == []
    assert np.all(np.any(trained.scalars != 0, axis=1))
    check_models_of_nodes(trained, grid)
    server = make_config(settings)
    for node in grid.nodes.values():
        assert node.handler._local_run is not None
        assert node.handler._local_run.config.objective is server.objective
        assert isinstance(node.handler._local_run.config.task, type(server.task))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "meerkat-vp"},
        {"method": "fedavg", "queries": 1},
        {"dp_noise": 1.0, "dp_clip": 1.0},
        {"clients_per_round": 2},
    ],
)
def test_settings_that_need_this_engines_own_server_are_rejected(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"own server|every client takes part"):
        run_strategy(monkeypatch, flower.FedAvg(**PLAIN), **settings)


def test_wrappers_cannot_clip_an_update_of_zeros() -> None:
    """Flower divides by the update's norm. If Flower fixes this, docs/distributed.md has to change."""
    with pytest.raises(ZeroDivisionError):
        compute_clip_model_update([np.zeros(8)], [np.zeros(8)], 1.0)
