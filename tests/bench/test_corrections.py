"""Corrections of the clients' scalars: the simulated rounds against their formulas, with gradients that are known."""

from typing import Any

import pytest
import torch
from torch import Tensor

from meerkat_engine.bench.experiments.corrected_rounds import Correction, Rounds
from meerkat_engine.bench.experiments.fewer_forwards.problem import Problem
from meerkat_engine.fed import make_config

CLIENTS, STEPS = 3, 4


@pytest.fixture(scope="module")
def problem() -> Problem:
    settings: dict[str, Any] = {"clients": CLIENTS, "calibration_texts": 16, "partition": "iid", "seed": 3, "lr": 0.02}
    return Problem.load(make_config(settings))


class Linear(Rounds):
    """Rounds in which client i has the gradient ``a_i + w - start``."""

    slopes: Tensor  # [K, k]

    def _scalar(self, data: Any, w: Tensor, z: Tensor) -> float:
        i = next(i for i, of_client in enumerate(self._clients) if of_client is data)
        return float(torch.dot(self.slopes[i] + w - self._problem.start, z))


def rounds(problem: Problem, correction: Correction, steps: int, generator: torch.Generator) -> Linear:
    made = Linear(problem, correction, steps)
    made.slopes = torch.randn(CLIENTS, problem.start.numel(), generator=generator)
    return made


CORRECTIONS = {
    "none": Correction(),
    "proximal": Correction(mu=7.0),
    "proximal, projected": Correction(mu=0.05, projected=True),
    "control variates": Correction(gamma=0.3, memory=0.25),
    "control variates, projected": Correction(gamma=0.3, memory=0.25, projected=True),
    "repeated seeds": Correction(repeated=True),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_rounds_follow_the_formulas(name: str, problem: Problem, generator: torch.Generator) -> None:
    """Three rounds, computed again in float64, client by client."""
    correction, lr = CORRECTIONS[name], problem.config.step.lr
    simulated = rounds(problem, correction, STEPS, generator)
    slopes, p = simulated.slopes.double(), [len(client) / 800 for client in simulated._clients]
    w = torch.zeros_like(slopes[0])  # less the base model's weights
    variates: list[Tensor] = [torch.zeros_like(w)] * CLIENTS
    last = [[0.0] * STEPS] * CLIENTS
    for number in range(3):
        repeats = correction.repeated and number == 1
        z = [problem.normal((number - repeats) * STEPS + t, 0).double() for t in range(STEPS)]
        common = sum(share * c for share, c in zip(p, variates, strict=True))
        means = [sum(share * g[t] for share, g in zip(p, last, strict=True)) for t in range(STEPS)]
        ends, scalars = [], []
        for i in range(CLIENTS):
            own, seen = w.clone(), []
            for t in range(STEPS):
                g = float((slopes[i] + own) @ z[t])
                seen.append(g)
                v = correction.mu * (own - w) + correction.gamma * (common - variates[i])
                g += means[t] - last[i][t] if repeats else 0.0
                own = own - lr * (g * z[t] + (float(v @ z[t]) * z[t] if correction.projected else v))
            ends.append(own)
            scalars.append(seen)
        share = correction.memory if number else 1.0
        newest = [sum(g * z_t for g, z_t in zip(seen, z, strict=True)) / STEPS for seen in scalars]
        variates = [(1 - share) * old + share * new for old, new in zip(variates, newest, strict=True)]
        w, last = sum(share * end for share, end in zip(p, ends, strict=True)), scalars  # type: ignore[assignment]
        simulated.run(number)
        torch.testing.assert_close((simulated.weights - problem.start).double(), w, rtol=1e-3, atol=1e-4)
        expected = (sum(float((end - w).square().sum()) for end in ends) / CLIENTS) ** 0.5
        assert simulated.spread[number] == pytest.approx(expected, rel=1e-3)


def test_with_one_local_step_no_correction_changes_the_mean(problem: Problem, generator: torch.Generator) -> None:
    """What is added to the scalars sums to zero over the clients, and a proximal term begins with the second step."""
    slopes = rounds(problem, Correction(), 1, generator).slopes
    ends = {}
    for name, correction in CORRECTIONS.items():
        simulated = rounds(problem, correction, 1, generator)
        simulated.slopes = slopes
        for number in (0, 2, 4):  # other seeds each time
            simulated.run(number)
        ends[name] = simulated.weights
    assert not torch.equal(ends["none"], problem.start)
    for end in ends.values():
        torch.testing.assert_close(end, ends["none"], rtol=1e-5, atol=1e-5)


def test_exact_proximal_steps_are_scalars_that_count_less_the_older_they_are(
    problem: Problem, generator: torch.Generator
) -> None:
    mu, lr = 7.0, problem.config.step.lr
    simulated = rounds(problem, Correction(mu=mu), STEPS, generator)
    simulated.run(0)
    uploaded = simulated._shares @ simulated._last * torch.tensor([(1 - lr * mu) ** (STEPS - t) for t in (1, 2, 3, 4)])
    moved = sum(lr * g * problem.normal(t, 0) for t, g in enumerate(uploaded))
    torch.testing.assert_close(simulated.weights, problem.start - moved, rtol=1e-4, atol=1e-5)


def test_exact_control_variates_leave_the_mean_to_the_raw_scalars(problem: Problem, generator: torch.Generator) -> None:
    simulated = rounds(problem, Correction(gamma=0.3), STEPS, generator)
    simulated.run(0)
    begin = simulated.weights
    simulated.run(1)
    scalars = (simulated._shares @ simulated._last).tolist()
    moved = sum(problem.config.step.lr * g * problem.normal(STEPS + t, 0) for t, g in enumerate(scalars))
    torch.testing.assert_close(simulated.weights, begin - moved, rtol=1e-4, atol=1e-5)


def test_a_round_takes_the_losses_of_the_clients_own_batches(problem: Problem) -> None:
    simulated = Rounds(problem, Correction(), 2)
    simulated.run(0)
    assert [client.seen for client in simulated._clients] == [2 * problem.config.step.batch_size] * CLIENTS
    assert not torch.equal(simulated.weights, problem.start)
    assert problem.evaluate(simulated.weights).examples == 400
