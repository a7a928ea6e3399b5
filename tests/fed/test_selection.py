"""Virtual-path client selection: statistics, thresholds, and the clients that complete runs stop early."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.fed import read_ledger
from meerkat_engine.fed.client import ClientData
from meerkat_engine.fed.config.run_config import make_config
from meerkat_engine.fed.run.execute import execute
from meerkat_engine.fed.run.replay import replay_run
from meerkat_engine.fed.selection import (
    PathStatistics,
    Thresholds,
    Windows,
    client_thresholds,
    null_thresholds,
    path_statistics,
    random_clients,
)

WINDOWS = Windows(initial=2, later=4)


def test_statistics_of_a_path() -> None:
    result = path_statistics([4.0, -2.0, 9.0, 0.5, -0.5, 2.0, -1.0], WINDOWS, sigma=0.75)
    assert result == PathStatistics(rho_later=3.0, rho_quie=0.5)


def test_a_path_that_falls_to_0_has_an_infinite_ratio() -> None:
    assert path_statistics([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], WINDOWS, sigma=0.1) == PathStatistics(
        rho_later=math.inf, rho_quie=1.0
    )


@pytest.mark.parametrize(("later", "quiet", "flagged"), [(3.1, 0.6, True), (3.0, 0.6, False), (3.1, 0.5, False)])
def test_a_client_is_flagged_if_both_thresholds_are_exceeded(later: float, quiet: float, flagged: bool) -> None:
    thresholds = Thresholds(rho_later=3.0, rho_quie=0.5, sigma=1.0)
    assert PathStatistics(rho_later=later, rho_quie=quiet).exceeds(thresholds) is flagged


def test_windows_longer_than_the_path_are_an_error() -> None:
    with pytest.raises(ValueError, match="the path has 3 values, too few for windows of 2 and 4"):
        path_statistics([1.0, 2.0, 3.0], WINDOWS, sigma=1.0)


def test_thresholds_are_above_the_statistics_of_all_null_paths() -> None:
    paths = [[4.0 + i, 4.0 - i, 1.0, 2.0, 1.0 + i / 4, 2.0] for i in range(4)]
    thresholds = null_thresholds(paths, WINDOWS)
    for path in paths:
        statistics = path_statistics(path, WINDOWS, thresholds.sigma)
        assert statistics.rho_later < thresholds.rho_later < 3 * statistics.rho_later
        assert not statistics.exceeds(thresholds)
    vanishing = [4.0, 4.0, 0.1, 0.1, 0.1, 0.1]
    assert path_statistics(vanishing, WINDOWS, thresholds.sigma).exceeds(thresholds)
    with pytest.raises(ValueError, match="need at least 3 null paths, got 2"):
        null_thresholds(paths[:2], WINDOWS)
    with pytest.raises(
        ConfigError, match="GradIP of null path 1 is 0 in all of its first 2 or last 4 values; increase eps"
    ):
        null_thresholds([paths[0], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], paths[1]], WINDOWS)


def halved_normal(rng: np.random.Generator, scale: float, s: np.ndarray) -> list[float]:
    """GradIP of a client whose gradient falls to ``scale`` after the initial window of 20 of 70 steps."""
    g = rng.standard_normal(len(s)) * np.where(np.arange(len(s)) < 20, 1.0, scale)
    return list(g * s)


@pytest.mark.parametrize("extreme", [0, 2, 5, 7])
def test_thresholds_from_the_clients_own_paths_separate_up_to_three_quarters_of_extreme_clients(extreme: int) -> None:
    """IID clients fall to a half, the others to a tenth. All share the perturbations, and so ``s``."""
    windows, flagged_iid, missed = Windows(initial=20, later=50), 0, 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        s = rng.standard_normal(70)
        paths = {i: halved_normal(rng, 0.1 if i < extreme else 0.5, s) for i in range(10)}
        thresholds = client_thresholds(paths, windows)
        exceeds = [path_statistics(path, windows, thresholds.sigma).exceeds(thresholds) for path in paths.values()]
        missed += extreme - sum(exceeds[:extreme])
        flagged_iid += sum(exceeds[extreme:])
    assert missed <= 0.05 * 20 * extreme
    assert flagged_iid <= 0.05 * 20 * (10 - extreme)


def test_the_standard_error_of_a_path_is_that_of_repeated_paths() -> None:
    """So chance alone keeps as many clients below the threshold as a normal distribution has below it."""
    windows, rng = Windows(initial=20, later=50), np.random.default_rng(1)
    s = rng.standard_normal(70)
    paths = {i: halved_normal(rng, 0.5, s) for i in range(4000)}
    thresholds = client_thresholds(paths, windows)
    ratios = np.log([path_statistics(path, windows, 1.0).rho_later for path in paths.values()])
    error = (math.log(thresholds.rho_later) - np.quantile(ratios, 0.25)) / 2
    assert error == pytest.approx(ratios.std(), rel=0.1)
    assert thresholds.rho_quie == pytest.approx(0.5 + 1 / math.sqrt(50))


def test_a_client_whose_gradip_is_0_at_the_end_is_flagged_by_the_others_paths() -> None:
    paths = {i: [4.0, 4.0 + i, 1.0, 2.0, 1.0, 2.0] for i in range(3)} | {3: [4.0, 4.0, 0.0, 0.0, 0.0, 0.0]}
    thresholds = client_thresholds(paths, WINDOWS)
    assert [path_statistics(path, WINDOWS, thresholds.sigma).exceeds(thresholds) for path in paths.values()] == [
        False, False, False, True
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="need at least 4 clients, the calibration has 3"):
        client_thresholds({i: paths[i] for i in range(3)}, WINDOWS)
    with pytest.raises(ConfigError, match="0 in all of the first 2 or last 4 values of 2 of 4 clients; increase eps"):
        client_thresholds(paths | {2: paths[3]}, WINDOWS)


def test_random_clients_depend_on_the_seed_only() -> None:
    clients = list(range(50))
    assert random_clients(clients, 7, 1) == random_clients(clients, 7, 1) != random_clients(clients, 7, 2)
    assert len(set(random_clients(clients, 7, 1))) == 7
    assert random_clients(clients, 0, 1) == []


SETTINGS = {
    "partition": "mixed", "clients": 4, "rounds": 3, "local_steps": 4, "vp_steps": 50, "vp_initial": 10, "vp_later": 25,
    "eval_examples": 100, "vp_null_paths": 3,
}  # fmt: skip


def run(output: Path, **settings: Any) -> dict[str, Any]:
    return execute(make_config(SETTINGS | settings), output, lambda _: None, lambda _: None)


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any], list[tuple[ClientData, list[int]]]]:
    """A run with two single-label clients: its directory, its summary, and every batch with the data it is from."""
    output: Path = tmp_path_factory.mktemp("vp") / "r"
    batches: list[tuple[ClientData, list[int]]] = []
    original = ClientData.next_indices

    def recording(self: ClientData) -> list[int]:
        batches.append((self, original(self)))
        return batches[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientData, "next_indices", recording)
        summary = run(output, method="meerkat-vp", vp_steps=100, vp_initial=20, vp_later=50, rounds=14)
    return output, summary, batches


Stopped = tuple[Path, dict[str, Any], list[tuple[ClientData, list[int]]]]


def test_single_label_clients_are_stopped_early(stopped: Stopped) -> None:
    _, summary, _ = stopped
    assert summary["stopped"] == summary["single_label_clients"] == [2, 3]
    assert summary["precision"] == summary["recall"] == 1.0
    thresholds = Thresholds(**summary["vp_thresholds"])
    flagged = [int(i) for i, values in summary["vp_statistics"].items() if PathStatistics(**values).exceeds(thresholds)]
    assert flagged == [2, 3]


def test_stopped_clients_take_one_step_a_round(stopped: Stopped) -> None:
    output, summary, _ = stopped
    ledger = read_ledger(output / "ledger.jsonl")
    for line in ledger.rounds:
        assert {i: len(g) for i, g in line.clients.items()} == {0: 4, 1: 4, 2: 1, 3: 1}
    assert summary["steps"] == 4 * 100 + 14 * (4 + 4 + 1 + 1)


def test_the_calibration_is_in_the_ledger_and_does_not_change_the_weights(stopped: Stopped) -> None:
    output, summary, _ = stopped
    ledger = read_ledger(output / "ledger.jsonl")
    assert ledger.calibration is not None
    assert ledger.calibration.stopped == [2, 3]
    assert ledger.calibration.scalars == []
    assert {len(g) for g in ledger.calibration.clients.values()} == {100}
    assert [line.round for line in ledger.rounds] == list(range(1, 15))
    assert replay_run(output).weights == summary["weights"]


def test_a_stopped_client_still_uses_all_its_examples(stopped: Stopped) -> None:
    """Every example is used, and none is repeated before all of them have been used."""
    _, summary, batches = stopped
    for client in summary["stopped"]:
        label = [count > 0 for count in summary["examples_by_client_and_label"][client]].index(True)
        own = [
            (data, batch)
            for data, batch in batches
            if len(data) == sum(summary["examples_by_client_and_label"][client])
            and set(data.task.labels[data.indices].tolist()) == {label}
        ]
        assert len({id(data) for data, _ in own}) == 1
        assert len(own) == 100 + 14  # the calibration, then one batch a round
        order = [example for _, batch in own for example in batch]
        examples = sorted(own[0][0].indices.tolist())
        for start in range(0, len(order) - len(examples) + 1, len(examples)):
            assert sorted(order[start : start + len(examples)]) == examples
        used_after_calibration = [example for _, batch in own[-14:] for example in batch]
        assert set(used_after_calibration) == set(examples)  # in the rounds with one step each


def test_gradip_is_written_for_the_calibration_and_every_round(stopped: Stopped) -> None:
    output, _, _ = stopped
    lines = [json.loads(line) for line in (output / "gradip.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(15))
    assert {len(client["gradip"]) for client in lines[0]["clients"].values()} == {100}
    assert [len(lines[1]["clients"][i]["norm"]) for i in "0123"] == [4, 4, 1, 1]


def test_shared_weights_are_those_of_the_clients_that_take_the_step(stopped: Stopped, tmp_path: Path) -> None:
    """From the same calibration, with the ledger's own scalars; and the run is replayed to its weights."""
    summary = run(tmp_path / "r", method="meerkat-vp", vp_steps=100, vp_initial=20, vp_later=50, rounds=1,
                  stopped_weight="share")  # fmt: skip
    kept = read_ledger(stopped[0] / "ledger.jsonl").rounds[0]
    shared = read_ledger(tmp_path / "r" / "ledger.jsonl").rounds[0]
    assert shared.clients == kept.clients
    counts = [sum(row) for row in summary["examples_by_client_and_label"]]
    assert shared.scalars[0] == kept.scalars[0]
    ratio = (counts[0] + counts[1]) / sum(counts)
    assert [g * ratio for g in shared.scalars[1:]] == pytest.approx(kept.scalars[1:], rel=1e-6)
    assert replay_run(tmp_path / "r").weights == summary["weights"]


def test_random_stop_stops_the_same_number_of_clients_at_random(stopped: Stopped, tmp_path: Path) -> None:
    summary = run(tmp_path / "r", method="random-stop", seed=1, clients=6)
    flagged = [
        int(i)
        for i, values in summary["vp_statistics"].items()
        if PathStatistics(**values).exceeds(Thresholds(**summary["vp_thresholds"]))
    ]
    assert len(summary["stopped"]) == len(flagged) > 0
    assert summary["stopped"] == random_clients(list(range(6)), len(flagged), 1)


def test_given_thresholds_need_no_null_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from meerkat_engine.fed.setup import selector

    monkeypatch.setattr(selector, "null_thresholds", lambda *_: pytest.fail("a null path was run"))
    given = {"vp_rho_later": 0.0, "vp_rho_quie": 0.0, "vp_sigma": 1e9}
    summary = run(tmp_path / "r", method="meerkat-vp", rounds=1, **given)
    assert summary["stopped"] == [0, 1, 2, 3]
    assert summary["vp_thresholds"] == {"rho_later": 0.0, "rho_quie": 0.0, "sigma": 1e9}


def test_thresholds_from_the_clients_need_no_held_out_examples_of_the_server(
    stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation has fewer than a batch, and no null path is run."""
    from meerkat_engine.fed.setup import selector

    monkeypatch.setattr(selector, "null_thresholds", lambda *_: pytest.fail("a null path was run"))
    calibration = {"vp_steps": 100, "vp_initial": 20, "vp_later": 50, "eval_examples": 8}
    summary = run(tmp_path / "r", method="meerkat-vp", rounds=1, vp_null="clients", **calibration)
    paths = {i: trace["gradip"] for i, trace in _first_traces(tmp_path / "r").items()}
    assert _first_traces(stopped[0]) == _first_traces(tmp_path / "r")
    expected = client_thresholds(paths, Windows(initial=20, later=50))
    assert summary["vp_thresholds"] == pytest.approx(vars(expected), rel=1e-4)  # the file has six digits
    assert summary["stopped"] == [2, 3]


def _first_traces(directory: Path) -> dict[str, Any]:
    traces: dict[str, Any] = json.loads((directory / "gradip.jsonl").read_text().splitlines()[0])["clients"]
    return traces


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vp_null": "clients", "clients": 3}, "vp_null clients needs at least 4 clients, got 3"),
        ({"vp_rho_later": 3.0}, "vp_rho_later, vp_rho_quie, vp_sigma go together; only vp_rho_later given"),
        (
            {"vp_steps": 10, "vp_later": 25},
            "vp_steps must be at least the 25 steps of a window",
        ),
        (
            {"method": "meerkat", "stopped_weight": "share"},
            "stopped_weight has no meaning for meerkat, which stops no client",
        ),
        ({"aggregation": "median", "stopped_weight": "share"}, "stopped_weight share is about weights, and median has"),
        ({"vp_null_paths": 2}, "vp_null_paths must be at least 3, got 2"),
        ({"vp_rho_later": math.nan, "vp_rho_quie": 0.5, "vp_sigma": 1.0}, "vp_rho_later must be finite and not neg"),
        ({"vp_rho_later": 1.0, "vp_rho_quie": 7.0, "vp_sigma": 1.0}, r"vp_rho_quie must be in \[0, 1\], got 7.0"),
        ({"vp_rho_later": 1.0, "vp_rho_quie": 0.5, "vp_sigma": -1.0}, "vp_sigma must be finite and not negative"),
    ],
    ids=str,
)
def test_invalid_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(SETTINGS | {"method": "meerkat-vp"} | settings)


def test_too_few_held_out_examples_for_a_null_path_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 held-out examples are too few for null paths"):
        run(tmp_path / "r", method="meerkat-vp", eval_examples=8)
    assert not (tmp_path / "r").exists()


def test_a_federation_with_a_calibration_needs_a_rule(federation: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="needs both gradip and select"):
        federation(calibration_steps=5)
