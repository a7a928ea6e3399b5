"""Tests of the experiment fewer-forwards: arithmetic of the rules, number of forwards, search, tables."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from meerkat_engine import cli
from meerkat_engine.bench.experiments.fewer_forwards import search
from meerkat_engine.bench.experiments.fewer_forwards.__main__ import main, together
from meerkat_engine.bench.experiments.fewer_forwards.experiment import rules_table
from meerkat_engine.bench.experiments.fewer_forwards.methods import METHODS, Method, Scalars, Unit
from meerkat_engine.bench.experiments.fewer_forwards.trial import run_trial, typical_scalar
from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.lm.evaluation import Evaluation

K, EPS, TYPICAL, LR = 64, 1e-3, 2.0, 0.01


class Batches:
    """Batches of 8 consecutive numbers."""

    def __init__(self) -> None:
        self.seen = 0

    def next_indices(self) -> list[int]:
        self.seen += 8
        return list(range(self.seen - 8, self.seen))


@dataclass
class Quadratic:
    """``sum_i h_i (w_i - t_i)^2 / 2`` plus a term of the batch, in float64; counts its calls by examples."""

    examples: int = 0
    start: Tensor = field(default_factory=lambda: torch.zeros(K, dtype=torch.float32, device="cpu"))
    eps: float = EPS

    def batches(self) -> Batches:
        return Batches()

    def normal(self, step: int, query: int) -> Tensor:
        return stream.normal(stream.step_seed(3, 0, step, query), torch.arange(K, device="cpu"))

    def scale_by_scores(self, power: float) -> Tensor:
        scale = torch.arange(1, K + 1, device="cpu").double() ** power
        return (scale / scale.square().mean().sqrt()).float()

    def loss(self, w: Tensor, indices: list[int]) -> float:
        self.examples += len(indices)
        return self.value(w) + 0.1 * sum(i % 8 for i in indices) / len(indices) * float(w[0])

    def value(self, w: Tensor) -> float:
        h = torch.linspace(0.1, 1, K, dtype=torch.float64, device="cpu")
        return float((h * (w.double() - 1).square()).sum() / 2)

    def evaluate(self, w: Tensor) -> Evaluation:
        self.last = w.clone()
        return Evaluation(loss=self.value(w), examples=1, scores={"accuracy": 0.5})


def end(method: Method, steps: int, lr: float = LR) -> Tensor:
    """Weights after some steps."""
    problem = Quadratic()
    run_trial(problem, method, lr, TYPICAL, steps * method.forwards, 1)  # type: ignore[arg-type]
    return problem.last


def scalar(w: Tensor, z: Tensor, indices: list[int]) -> float:
    problem = Quadratic()
    return (problem.loss(w + EPS * z, indices) - problem.loss(w - EPS * z, indices)) / (2 * EPS)


def test_the_two_point_step_is_that_of_the_engine() -> None:
    problem, w, batches = Quadratic(), torch.zeros(K, dtype=torch.float32, device="cpu"), Batches()
    for step in range(3):
        z = problem.normal(step, 0)
        w = w - LR * scalar(w, z, batches.next_indices()) * z
    torch.testing.assert_close(end(METHODS["two-point"], 3), w, rtol=1e-5, atol=1e-6)


def test_fzoo_divides_one_sided_differences_by_the_deviation_of_the_losses() -> None:
    method = replace(METHODS["FZOO, q = 4"], queries=3)
    problem, w, indices = Quadratic(), torch.zeros(K, dtype=torch.float32, device="cpu"), list(range(8))
    directions = [problem.normal(0, query) for query in range(3)]
    losses = torch.tensor([problem.loss(w + EPS * z, indices) for z in directions], dtype=torch.float64, device="cpu")
    c = TYPICAL * (losses - problem.loss(w, indices)) / losses.std()
    expected = -LR / 3 * sum(float(c_j) * z for c_j, z in zip(c, directions, strict=True))
    torch.testing.assert_close(end(method, 1), expected, rtol=1e-4, atol=1e-6)


def test_momentum_is_decayed_coefficients_of_past_seeds() -> None:
    beta, steps = 0.5, 4
    problem, w, batches = Quadratic(), torch.zeros(K, dtype=torch.float32, device="cpu"), Batches()
    past: list[tuple[Tensor, float]] = []
    for step in range(steps):
        z = problem.normal(step, 0)
        past.append((z, scalar(w, z, batches.next_indices())))
        w = w - LR * sum((1 - beta) * beta ** (step - i) * g * z for i, (z, g) in enumerate(past))
    torch.testing.assert_close(end(Method(name="m", momentum=beta), steps), w, rtol=1e-4, atol=1e-6)


def test_the_diagonal_follows_from_past_scalars() -> None:
    nu = 0.25
    problem, w, batches = Quadratic(), torch.zeros(K, dtype=torch.float32, device="cpu"), Batches()
    h = torch.full((K,), TYPICAL**2, dtype=torch.float32, device="cpu")
    for step in range(3):
        direction = problem.normal(step, 0) / (h / h.mean()).sqrt()
        update = scalar(w, direction, batches.next_indices()) * direction
        w = w - LR * update
        h = (1 - nu) * h + nu * update.square()
    torch.testing.assert_close(end(Method(name="h", curvature=nu), 3), w, rtol=1e-4, atol=1e-6)


def test_scores_scale_perturbation_and_update() -> None:
    problem, w = Quadratic(), torch.zeros(K, dtype=torch.float32, device="cpu")
    direction = problem.normal(0, 0) * problem.scale_by_scores(0.25)
    expected = -LR * scalar(w, direction, list(range(8))) * direction
    torch.testing.assert_close(end(METHODS["scores ** 1/4"], 1), expected, rtol=1e-4, atol=1e-6)


def test_each_query_of_a_split_batch_sees_its_own_part() -> None:
    problem, w = Quadratic(), torch.zeros(K, dtype=torch.float32, device="cpu")
    directions = [problem.normal(0, query) for query in range(4)]
    parts = [[query, query + 4] for query in range(4)]
    expected = -LR / 4 * sum(scalar(w, z, part) * z for z, part in zip(directions, parts, strict=True))
    torch.testing.assert_close(end(METHODS["split batch, q = 4"], 1), expected, rtol=1e-4, atol=1e-6)


def test_rademacher_perturbations_are_signs() -> None:
    moved = end(Method(name="r", rademacher=True), 1)
    assert moved.abs().unique().numel() == 1
    assert torch.equal(moved.sign().abs(), torch.ones_like(moved))
    assert 0 < int((moved > 0).sum()) < K


def test_a_linear_schedule_ends_at_zero() -> None:
    method = METHODS["two-point, linear schedule"]
    assert [method.rate(1.0, step / 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("unit", "given", "expected"),
    [
        (Unit.NONE, [3.0, -4.0], [3.0, -4.0]),
        (Unit.CLIP, [3.0, -4.0, 1.0], [2.0, -2.0, 1.0]),
        (Unit.SIGN, [3.0, -4.0], [2.0, -2.0]),
        (Unit.LOSSES, [1.0, 3.0], [2.0 / 2**0.5, 6.0 / 2**0.5]),
        (Unit.LOSSES, [1.0, 1.0], [0.0, 0.0]),
        (Unit.RMS, [3.0, -4.0], [6.0 / 12.5**0.5, -8.0 / 12.5**0.5]),
        (Unit.RMS, [0.0], [0.0]),
    ],
    ids=str,
)
def test_scalars_are_divided_by_their_unit(unit: Unit, given: list[float], expected: list[float]) -> None:
    assert Scalars(Method(name="u", unit=unit), TYPICAL).coefficients(given) == pytest.approx(expected)


def test_the_mean_square_remembers_past_scalars() -> None:
    scalars = Scalars(Method(name="u", unit=Unit.RMS), 1.0)
    scalars.coefficients([3.0])
    mean_square = (0.95 * 9 + 16) / 1.95
    assert scalars.coefficients([4.0]) == pytest.approx([4 / math.sqrt(mean_square)])


@pytest.mark.parametrize("name", METHODS)
def test_forwards_are_counted_in_whole_batches(name: str) -> None:
    problem, method = Quadratic(), METHODS[name]
    curve = run_trial(problem, method, LR, TYPICAL, 3 * method.forwards + 1, 3)  # type: ignore[arg-type]
    assert problem.examples / 8 == curve[-1]["forwards"] == 3 * method.forwards
    assert len(curve) == 3


@pytest.mark.parametrize("name", METHODS)
def test_every_rule_lowers_the_loss(name: str) -> None:
    curve = run_trial(Quadratic(), METHODS[name], 3e-3, TYPICAL, 680, 1)  # type: ignore[arg-type]
    assert curve[-1]["loss"] < 0.95 * Quadratic().value(Quadratic().start)


def test_a_trial_that_diverges_ends() -> None:
    curve = run_trial(Quadratic(), METHODS["two-point"], 1e38, TYPICAL, 40, 2)  # type: ignore[arg-type]
    assert curve[-1]["loss"] is None
    assert curve[-1]["forwards"] < 40


def test_too_few_forwards_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"FZOO, q = 8 takes 1 steps of 9 forwards in 10 forwards"):
        run_trial(Quadratic(), METHODS["FZOO, q = 8"], LR, TYPICAL, 10, 2)  # type: ignore[arg-type]


def test_the_typical_scalar_is_that_of_the_first_steps() -> None:
    problem, w, batches = Quadratic(), torch.zeros(K, dtype=torch.float32, device="cpu"), Batches()
    squares = [scalar(w, problem.normal(step, 0), batches.next_indices()) ** 2 for step in range(16)]
    assert typical_scalar(problem) == pytest.approx(math.sqrt(sum(squares) / 16), rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("best", [-3, -1, 0, 1, 2, 3])
def test_the_search_finds_the_best_of_neighbouring_rates(best: int) -> None:
    losses: dict[int, float] = {}
    while len(losses) < 5:
        exponent = search._next_exponent(losses)
        assert exponent not in losses
        losses[exponent] = abs(exponent - best)
    assert max(losses) - min(losses) == 4  # consecutive
    assert min(losses, key=lambda exponent: losses[exponent]) == best


def measured_of(*names: str) -> dict[str, object]:
    losses = {"two-point": (0.8, 0.6), "FZOO, q = 4": (0.6, 0.5)}
    return {
        "forwards": 100,
        "typical_scalar": 1.0,
        "lr": 0.1,
        "before": {"0": [1.0, 0.5], "1": [1.0, 0.5]},
        "methods": {
            name: {
                "lr": 0.1,
                "tuning": [[0.1, 0.5]],
                "trials": {
                    seed: [
                        {"forwards": 50, "loss": losses[name][0] + shift, "score": 0.5},
                        {"forwards": 100, "loss": losses[name][1] + shift, "score": 0.75},
                    ]
                    for seed, shift in (("0", 0.1), ("1", -0.1))
                },
            }
            for name in names
        },
    }


def test_the_table_pairs_losses_by_seed_and_says_how_many_forwards_are_needed() -> None:
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in rules_table(measured_of("two-point", "FZOO, q = 4")).splitlines()
    ]
    assert lines[3] == ["FZOO, q = 4", "0.1", "20", "0.750 ± 0.000", "0.500 ± 0.141", "-0.100 ± 0.000", "50"]
    assert lines[4] == ["two-point", "0.1", "50", "0.750 ± 0.000", "0.600 ± 0.141", "", "100"]


def test_parts_are_put_together(tmp_path: Path) -> None:
    names = ["two-point", "FZOO, q = 4"]
    for i, name in enumerate(names):
        (tmp_path / f"{i}.json").write_text(json.dumps(measured_of(name)))
    output, figure = tmp_path / "all.json", tmp_path / "figure.png"
    result = CliRunner().invoke(
        main,
        ["--part", str(tmp_path / "0.json"), "--part", str(tmp_path / "1.json"), "--output", str(output),
         "--figure", str(figure)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text()) == measured_of(*names)
    assert rules_table(measured_of(*names)) in result.output
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give names of rules to measure, or --part"),
        (["two-point", "--part", "0.json"], "give names of rules to measure, or --part"),
        (["two-point", "--output", "0.json"], "0.json exists; choose another --output"),
        (["two-point", "--lr", "-1"], "lr must be finite and not negative"),
    ],
    ids=str,
)
def test_what_a_process_cannot_do_is_an_error(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("0.json").write_text("kept")
    result = CliRunner().invoke(main, ["--output", "new.json", *arguments])
    assert result.exit_code != 0
    assert message in result.output
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("0.json", "kept")]


def test_parts_of_other_settings_are_rejected() -> None:
    with pytest.raises(ConfigError, match="only rules may differ"):
        together([measured_of("two-point"), measured_of("FZOO, q = 4") | {"forwards": 50}])


def test_a_process_measures_some_rules(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main,
        ["two-point", "FZOO, q = 4", "--rounds", "1", "--local-steps", "20", "--eval-examples", "40",
         "--calibration-texts", "16", "--seeds", "2", "--seed", "5", "--output", str(tmp_path / "r.json")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "r.json").read_text())
    assert measured["forwards"] == 40
    for name in ("two-point", "FZOO, q = 4"):
        of_rule = measured["methods"][name]
        assert len(of_rule["tuning"]) == 4
        assert [lr for lr, loss in of_rule["tuning"] if loss == min(loss for _, loss in of_rule["tuning"])] == [
            of_rule["lr"]
        ]
        assert list(of_rule["trials"]) == ["5", "6"]
        assert [point["forwards"] for point in of_rule["trials"]["5"]] == [10, 20, 30, 40]
    assert len(set(map(tuple, measured["before"].values()))) == 2  # each seed has its own held-out examples


def test_the_command_writes_a_table_and_a_figure_of_all_rules(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli.main,
        ["experiment", "fewer-forwards", "--rounds", "1", "--local-steps", "68", "--eval-examples", "40",
         "--seeds", "1", "--calibration-texts", "16", "--output", str(tmp_path / "e")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    table = (tmp_path / "e" / "result.md").read_text()
    assert table.strip() in result.output
    assert {line.split("|")[1].strip() for line in table.split("\n\n")[1].splitlines()[2:]} == {"before", *METHODS}
    assert (tmp_path / "e" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_settings_that_the_rules_replace_are_rejected(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli.main, ["experiment", "fewer-forwards", "--clients", "4", "--output", str(tmp_path / "e")]
    )
    assert result.exit_code == 1
    assert "the experiment fewer-forwards sets clients itself" in result.output
