"""The search of ``meerkat-engine tune`` on known losses: where it goes, what it leaves out, and where it ends."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meerkat_engine.bench.tune import search as module
from meerkat_engine.bench.tune.grid import Grid, Point
from meerkat_engine.bench.tune.search import Search, rungs
from meerkat_engine.fed import make_config
from meerkat_engine.fed.config.run_config import RunConfig

Landscape = Callable[[RunConfig, int], float]
START = 0.7


class KnownCandidate:
    """A candidate whose held-out loss after a round is a function of its settings and the round."""

    landscape: Landscape

    def __init__(self, config: RunConfig, directory: Path) -> None:
        self.config, self.rounds, self.error = config, 0, ""
        self.lines: list[dict[str, Any]] = [{}]

    def run_to(self, rounds: int, base: object) -> None:
        self.rounds = rounds

    def loss(self, round: int) -> float:
        assert round <= self.rounds
        return START if round == 0 else type(self).landscape(self.config, round)


def search(
    monkeypatch: pytest.MonkeyPatch, landscape: Landscape, *, lrs: tuple[float, ...] = (), **axes: bool
) -> tuple[dict[str, float], Search]:
    """Searches around a learning rate of 0.01, and returns the best values and the search."""
    monkeypatch.setattr(KnownCandidate, "landscape", staticmethod(landscape), raising=False)
    monkeypatch.setattr(module, "Candidate", KnownCandidate)
    grid = Grid(
        make_config({"lr": 0.01, "density": 1e-3, "rounds": 32}), lrs, **{"eps": False, "density": False} | axes
    )
    found = Search(grid, rungs(16), None, Path(), lambda _: None)  # type: ignore[arg-type]
    return grid.values(found.run()), found


def bowl(best: float, round: int, lr: float) -> float:
    """A loss that falls with the rounds, fastest at the best learning rate, and rises far above it."""
    away = math.log2(lr / best)
    return START - 0.01 * round * 2 ** -abs(away) if away < 3 else START * away


@pytest.mark.parametrize("steps", range(-12, 11))
def test_the_best_learning_rate_is_found_within_and_beyond_the_first_three_decades(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    best = 0.01 * 2.0 ** max(steps, -10)
    values, found = search(monkeypatch, lambda config, round: bowl(0.01 * 2.0**steps, round, config.step.lr))
    assert values["lr"] == pytest.approx(best, rel=1e-3)
    assert found.grid.edges(Point(lr=max(steps, -10))) == (
        ["the smallest lr"] if steps <= -10 else ["the largest lr"] if steps == 10 else []
    )
    assert len(found.candidates) <= 21
    assert sum(rounds == 16 for rounds in found.reached.values()) <= 6  # what lies on the way there has only short runs


def test_a_rate_that_leads_in_short_runs_loses_to_a_smaller_one_that_fell_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best rate moves from 0.16 after the first rung to 0.005 after the last, where the others have stopped."""
    best = {4: 0.16, 8: 0.04, 16: 0.005}
    values, found = search(monkeypatch, lambda config, round: bowl(best[round], round, config.step.lr))
    assert values["lr"] == 0.005
    assert {point.lr for point, rounds in found.reached.items() if rounds == 16} >= {-2, -1, 0}


def test_half_of_what_has_not_diverged_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = search(monkeypatch, lambda config, round: bowl(0.01, round, config.step.lr))
    by_rounds = {rung: sorted(p.lr for p, rounds in found.reached.items() if rounds >= rung) for rung in found.rungs}
    assert by_rounds[4] == list(range(-5, 6))  # of these, 3, 4 and 5 have diverged
    assert by_rounds[8] == [-2, -1, 0, 1]
    assert by_rounds[16] == [-1, 0, 1]


def test_a_run_that_diverges_is_not_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    def landscape(config: RunConfig, round: int) -> float:
        return math.inf if config.step.lr > 0.015 and round >= 8 else bowl(0.01, round, config.step.lr)

    values, found = search(monkeypatch, landscape)
    assert values["lr"] == 0.01
    assert found.reached[Point(lr=1)] == 8
    assert found.diverged(Point(lr=1))


def test_losses_that_rise_a_little_are_noise_and_not_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    def landscape(config: RunConfig, round: int) -> float:
        return START + 0.001 * math.log2(0.32 / config.step.lr) if round < 16 else bowl(0.16, round, config.step.lr)

    assert search(monkeypatch, landscape)[0]["lr"] == 0.16


def test_of_equal_losses_the_smallest_learning_rate_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert search(monkeypatch, lambda *_: 0.5, lrs=(0.3, 0.1, 0.2))[0]["lr"] == 0.1


@pytest.mark.parametrize(("share", "chosen"), [(0.98, 0.005), (0.95, 0.01)])
def test_half_the_learning_rate_is_chosen_if_it_is_nearly_as_good(
    monkeypatch: pytest.MonkeyPatch, share: float, chosen: float
) -> None:
    def landscape(config: RunConfig, round: int) -> float:
        shares = {0.01: 1.0, 0.005: share, 0.0025: 0.99 * share}
        return START - 0.02 * round * shares.get(config.step.lr, 0.1)

    values, found = search(monkeypatch, landscape)
    assert values["lr"] == 0.01
    assert found.grid.values(found.safer(Point(lr=0)))["lr"] == chosen


def test_a_smaller_learning_rate_that_diverged_or_is_not_on_the_grid_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, found = search(monkeypatch, lambda config, _: 0.5 if config.step.lr == 0.2 else math.inf, lrs=(0.1, 0.2))
    assert found.safer(Point(lr=1)) == Point(lr=1)
    _, found = search(monkeypatch, lambda *_: 0.5, lrs=(0.1, 0.2))
    assert found.safer(Point(lr=0)) == Point(lr=0)


def test_given_rates_are_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    values, found = search(
        monkeypatch, lambda config, round: bowl(1.0, round, config.step.lr), lrs=(0.3, 0.1, 0.2, 0.1)
    )
    assert values["lr"] == 0.3
    assert len(found.candidates) == 3
    assert found.grid.edges(Point(lr=2)) == ["the largest lr"]


def test_eps_and_density_are_searched_with_the_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def landscape(config: RunConfig, round: int) -> float:
        eps, density = (abs(math.log10(value)) for value in (config.step.eps / 1e-4, config.mask.density / 1e-2))
        best = 0.02 * (0.001 / config.mask.density) ** 0.5  # the fewer elements, the larger
        return bowl(best, round, config.step.lr) + 0.01 * (eps + density)

    values, _ = search(monkeypatch, landscape, eps=True, density=True)
    assert values == {"lr": 0.006325, "eps": 1e-4, "density": 0.01}
    values, found = search(monkeypatch, landscape)
    assert values == {"lr": 0.02, "eps": 1e-3, "density": 1e-3}
    assert {point.eps for point in found.candidates} == {point.density for point in found.candidates} == {0}


def test_a_search_that_goes_on_takes_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in the directory may have more rounds than the search has looked at: it must not look ahead."""

    def landscape(config: RunConfig, round: int) -> float:
        return math.inf if round == 16 and config.step.lr > 0.004 else bowl(0.01, round, config.step.lr)

    _, first = search(monkeypatch, landscape)
    finished = {found.config.step.lr: found.rounds for found in first.candidates.values()}
    start = KnownCandidate.__init__

    def with_rounds(self: KnownCandidate, config: RunConfig, directory: Path) -> None:
        start(self, config, directory)
        self.rounds = finished[config.step.lr]  # fails for a run that the first search did not have

    monkeypatch.setattr(KnownCandidate, "__init__", with_rounds)
    monkeypatch.setattr(KnownCandidate, "run_to", None)
    _, again = search(monkeypatch, landscape)
    assert again.reached == first.reached


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2]), (4, [1, 2, 4]), (10, [2, 4, 8]), (15, [3, 6, 12]), (100, [25, 50, 100])],
)
def test_rungs_are_multiples_of_the_first(rounds: int, expected: list[int]) -> None:
    assert rungs(rounds) == expected
