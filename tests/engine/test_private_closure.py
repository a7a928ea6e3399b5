"""Private scalars: clipping and noise, the influence of one example, the noise distribution, Poisson samples."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.lm.objective import Objective, example_losses, task_loss
from meerkat_engine.engine.lm.tasks import SST2, Task
from meerkat_engine.engine.private_closure import PrivateClosure, gaussian
from meerkat_engine.engine.weights import round_fp32

from helpers.losses import TOLERANCE, candidate_log_likelihoods, micro_batches
from helpers.models import make_model
from helpers.prompts import MULTI_TOKEN_TASK, SEVEN_ROWS, encode_task
from helpers.tensors import flat_weights, same_bits

NAN, INF = float("nan"), float("inf")
TERMS = {"clip": 2e-3, "noise_multiplier": 0.7, "batch_size": 5, "seed": 31}


@pytest.fixture(params=["two-point", "forward-difference"])
def estimator(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def noise(seed: int, query: int) -> float:
    """Sum of four of the stream's normals divided by 2, each from a separate Philox block."""
    return sum(stream.normal(seed, torch.tensor([16 * query + 4 * i])).item() for i in range(4)) / 2


def difference(before: list[float], after: list[float], *, query: int = 0, clip: float = 2e-3) -> float:
    """Computes a query's ``d`` with ``TERMS``, example by example in Python floats."""
    total = 0.0
    for a, b in zip(before, after, strict=True):
        total += 0.0 if math.isnan(a - b) else min(max(a - b, -clip), clip)
    return round_fp32((total + 0.7 * clip * noise(31, query)) / 5)


def released(before: list[float], after: list[float]) -> float:
    """Returns the ``d`` that a closure with these losses releases."""
    queue = [torch.tensor(before), torch.tensor(after)]
    closure = PrivateClosure(lambda: queue.pop(0), estimator="two-point", **TERMS)  # type: ignore[arg-type]
    first, second = closure(), closure()
    assert (first.dtype, first.item(), second.dtype, second.shape) == (torch.float32, 0.0, torch.float32, ())
    return -second.item()


@pytest.mark.parametrize("q", [1, 3])
def test_a_private_step_is_its_formula(estimator: str, q: int) -> None:
    """Compares the scalars with a computation from each example's losses; the weights change only by these scalars."""
    model, other, data = make_model(), make_model(), encode_task(MULTI_TOKEN_TASK, rows=SEVEN_ROWS)
    (batch,) = micro_batches(data, Objective.CANDIDATES, [7])
    mask, clip, calls = SparseMask.random(model, 0.05, 1), 0.02 if estimator == "two-point" else 0.01, []

    def losses() -> torch.Tensor:
        calls.append(None)
        return example_losses(model, batch, Objective.CANDIDATES)

    opt = SparseZO(model, mask, lr=0.1, eps=1e-2, seed=9, queries=q, estimator=estimator)
    opt.step(PrivateClosure(losses, estimator=estimator, queries=q, **{**TERMS, "clip": clip}))  # type: ignore[arg-type]
    assert len(calls) == (2 * q if estimator == "two-point" else q + 1)
    hand = SparseZO(other, mask, lr=0.1 / q, eps=1e-2)

    def at(seed: int, scale: float) -> list[float]:
        hand.perturb(seed, scale)
        with torch.inference_mode():
            return example_losses(other, batch, Objective.CANDIDATES).tolist()

    wanted, clipped = [], 0
    for j in range(q):
        seed = stream.step_seed(9, 0, 0, j)
        plus, less = at(seed, 1e-2), at(seed, -1e-2 if estimator == "two-point" else 0.0)
        clipped += sum(abs(a - b) > clip for a, b in zip(plus, less, strict=True))
        d = difference(plus, less, query=j, clip=clip)
        wanted.append(round_fp32(d / (2e-2 if estimator == "two-point" else 1e-2)))
    assert 0 < clipped < 7 * q  # some differences are clipped, some are not
    assert opt.projected_gradients == pytest.approx(wanted, rel=1e-6)  # a sum in another order
    hand.restore()
    for j, g in enumerate(opt.projected_gradients):
        hand.apply(stream.step_seed(9, 0, 0, j), g)
    assert same_bits(flat_weights(model), flat_weights(other))


def test_normalized_scalars_are_made_of_private_differences(llama: nn.Module) -> None:
    """The deviation is that of the noisy differences: nothing else of the losses reaches the scalars."""
    queue = [[1.0, 2.0], [1 + 2**-10, 2.0], [1.5, 2.0], [1.0, 2 - 2**-10]]
    private = [difference(after, queue[0], query=j) for j, after in enumerate(queue[1:])]
    opt = SparseZO(
        llama, SparseMask.random(llama, 0.05, 1), lr=0.1, queries=3, estimator="normalized-difference",
        nonfinite="skip",
    )  # fmt: skip
    losses = [torch.tensor(values) for values in queue]
    opt.step(PrivateClosure(lambda: losses.pop(0), estimator="normalized-difference", queries=3, **TERMS))  # type: ignore[arg-type]
    deviation = statistics.stdev(private)
    assert opt.projected_gradients == pytest.approx([d / deviation for d in private], rel=1e-5)


@pytest.mark.parametrize(
    ("before", "after", "sum_in_clips"),
    [
        ([], [], 0.0),
        ([NAN, 1.0], [1.0, NAN], 0.0),
        ([INF, 1.0, -INF], [1.0, INF, INF], -1.0),
        ([INF, 1.0], [INF, 1 - 2**-10], 2**-10 / 2e-3),
        ([3e38], [-3e38], 1.0),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 3 + 2**-10], 2 - 2**-10 / 2e-3),
    ],
    ids=["no example", "nan", "inf", "inf - inf", "fp32's range", "numbers"],
)
def test_any_loss_has_a_bounded_effect(before: list[float], after: list[float], sum_in_clips: float) -> None:
    d = released(before, after)
    assert d == pytest.approx(difference(before, after), rel=1e-6)
    assert d - difference([], []) == pytest.approx(sum_in_clips * 2e-3 / 5, abs=1e-7)


def test_the_sum_is_computed_in_float64() -> None:
    queue = [torch.tensor([1.0, 2**-30, 0.0]), torch.tensor([0.0, 0.0, 1.0])]
    fine = {**TERMS, "clip": 1.0, "noise_multiplier": 1e-9}
    closure = PrivateClosure(lambda: queue.pop(0), estimator="two-point", **fine)  # type: ignore[arg-type]
    closure()
    assert -closure().item() == pytest.approx((2**-30 + 1e-9 * noise(31, 0)) / 5, rel=1e-6)


LOSSES = st.floats(width=32) | st.sampled_from([NAN, INF, -INF, 0.0])


@given(st.lists(st.tuples(LOSSES, LOSSES), max_size=6), st.tuples(LOSSES, LOSSES), st.data())
def test_an_example_changes_the_released_value_by_at_most_clip_over_batch_size(
    pairs: list[tuple[float, float]], extra: tuple[float, float], data: st.DataObject
) -> None:
    """The bound is one clip for an added example, and two clips for a replaced one."""
    at = data.draw(st.integers(0, len(pairs)))

    def released_from(rows: list[tuple[float, float]]) -> float:
        return released([a for a, _ in rows], [b for _, b in rows])

    without, bound, rounding = released_from(pairs), 2e-3 / 5, 1e-9
    assert math.isfinite(without)
    assert abs(released_from([*pairs[:at], extra, *pairs[at:]]) - without) <= bound + rounding
    if at < len(pairs):
        assert abs(released_from([*pairs[:at], extra, *pairs[at + 1 :]]) - without) <= 2 * bound + rounding


def test_a_private_step_is_applied_for_any_losses(llama: nn.Module, estimator: str) -> None:
    opt = SparseZO(llama, SparseMask.random(llama, 0.05, 1), lr=0.1, estimator=estimator, nonfinite="skip")
    for bad in (NAN, INF, -INF):
        opt.step(PrivateClosure(lambda bad=bad: torch.full((4,), bad), estimator=estimator, **TERMS))  # type: ignore[misc, arg-type]
    eps = 2e-3 if estimator == "two-point" else 1e-3
    assert opt.projected_gradients == pytest.approx([difference([], []) / eps] * 3, rel=1e-6)


def test_the_noise_is_standard_normal() -> None:
    draws = [gaussian(seed, draw) for seed in range(100) for draw in range(100)]
    assert len(set(draws)) == len(draws)
    assert stats.kstest(draws, "norm").pvalue > 0.01
    assert torch.tensor(draws).var().item() == pytest.approx(1.0, abs=0.05)
    by_seed = torch.tensor(draws).view(100, 100)
    for pair in (by_seed[:, :-1].flatten(), by_seed[:, 1:].flatten()), (by_seed[:-1].flatten(), by_seed[1:].flatten()):
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1].item()) < 0.05
    assert gaussian(7, 2) == noise(7, 2)
    assert round_fp32(gaussian(7, 2)) != gaussian(7, 2)  # finer than fp32


def test_the_released_value_has_the_specified_noise() -> None:
    found = []
    for seed in range(2000):
        closure = PrivateClosure(lambda: torch.empty(0), estimator="two-point", **{**TERMS, "seed": seed})  # type: ignore[arg-type]
        closure()
        found.append(-closure().item())
    assert torch.tensor(found).std().item() == pytest.approx(0.7 * 2e-3 / 5, rel=0.06)
    assert abs(torch.tensor(found).mean().item()) < 4 * 0.7 * 2e-3 / 5 / math.sqrt(2000)


@pytest.mark.parametrize("q", [1, 2])
def test_noise_is_not_used_twice(estimator: str, q: int) -> None:
    """A closure serves one step only, and every query of the step has different noise."""
    closure = PrivateClosure(lambda: torch.ones(3), estimator=estimator, queries=q, **TERMS)  # type: ignore[arg-type]
    values = [closure().item() for _ in range(2 * q if estimator == "two-point" else q + 1)]
    noises = [abs(value) for value in values if value]
    assert noises == pytest.approx([abs(difference([], [], query=j)) for j in range(q)], rel=1e-6)
    with pytest.raises(ValueError, match="a private closure serves one step only"):
        closure()


def test_other_than_one_loss_per_example_is_rejected() -> None:
    def closure(*losses: torch.Tensor) -> Callable[[], torch.Tensor]:
        queue = list(losses)
        return PrivateClosure(lambda: queue.pop(0), estimator="two-point", **TERMS)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"one loss per example, the same number in each call: got shape \[\]"):
        closure(torch.tensor(0.5))()
    uneven = closure(torch.ones(3), torch.ones(2))
    uneven()
    with pytest.raises(ValueError, match=r"got shape \[2\] after \[3\]"):
        uneven()


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"clip": 0.0}, "the clip of private steps must be finite and positive, got 0.0"),
        ({"clip": INF}, "the clip of private steps must be finite"),
        ({"noise_multiplier": -1.0}, "the noise multiplier of private steps must be finite and positive"),
        ({"noise_multiplier": NAN}, "the noise multiplier of private steps must be finite and positive"),
        ({"batch_size": 0}, "the expected batch size of private steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be in"),
        ({"queries": 0}, "queries must be an integer"),
        ({"estimator": "other"}, "unknown estimator"),
    ],
    ids=str,
)
def test_terms_out_of_range_are_rejected(terms: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        PrivateClosure(lambda: torch.ones(3), **{"estimator": "two-point", **TERMS, **terms})  # type: ignore[arg-type]
    assert isinstance(caught.value, ConfigError) == ("private steps" in message)


@pytest.mark.parametrize("task", [SST2, MULTI_TOKEN_TASK], ids=["one token", "several tokens"])
@pytest.mark.parametrize("objective", list(Objective))
def test_example_losses_match_a_computation_one_by_one(architecture: str, objective: Objective, task: Task) -> None:
    model, data = make_model(architecture), encode_task(task, rows=SEVEN_ROWS)
    (batch,) = micro_batches(data, objective, [7])
    found = example_losses(model, batch, objective)
    assert (found.dtype, found.shape) == (torch.float32, (7,))
    for i, row in enumerate(SEVEN_ROWS):
        tokens = candidate_log_likelihoods(model, data, i)
        means = torch.tensor([sum(each) / len(each) for each in tokens])
        gold = -means[row["label"]]
        wanted = gold + means.logsumexp(0) if objective is Objective.CANDIDATES else gold
        assert found[i].item() == pytest.approx(wanted.item(), abs=2e-5)
    parts = micro_batches(data, objective, [3, 3, 1])
    assert example_losses(model, parts, objective).tolist() == pytest.approx(found.tolist(), abs=TOLERANCE)
    if objective is Objective.CANDIDATES or task is SST2:  # answers of one length
        assert found.mean().item() == pytest.approx(task_loss(model, batch, objective).item(), abs=TOLERANCE)


def test_a_batch_without_examples_has_no_losses(llama: nn.Module) -> None:
    found = example_losses(llama, [], Objective.CANDIDATES)
    assert (found.dtype, found.shape) == (torch.float32, (0,))


def test_a_poisson_sample_draws_each_number_independently() -> None:
    n, rounds = 50, 4000
    taken = torch.zeros(rounds, n)
    for seed in range(rounds):
        drawn = stream.poisson_sample(seed, n, 10)
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        taken[seed, drawn] = 1
    spread = 5 * math.sqrt(0.2 * 0.8 / rounds)
    assert (taken.mean(0) - 0.2).abs().max() < spread
    together = taken.T @ taken / rounds - taken.mean(0)[:, None] * taken.mean(0)
    assert together.fill_diagonal_(0).abs().max() < spread
    assert stats.chisquare(*binomial_counts(taken.sum(1), n, 0.2)).pvalue > 0.01


def binomial_counts(sizes: torch.Tensor, n: int, p: float) -> tuple[list[float], list[float]]:
    """Observed and expected numbers of samples with at most 5, with 6 to 14, and with at least 15 elements."""
    low, high = 5, 15
    observed = [float((sizes.clamp(low, high) == size).sum()) for size in range(low, high + 1)]
    shares = [stats.binom.cdf(low, n, p), *stats.binom.pmf(range(low + 1, high), n, p), stats.binom.sf(high - 1, n, p)]
    return observed, [len(sizes) * share for share in shares]


def test_poisson_samples_at_the_limits_of_their_arguments() -> None:
    assert stream.poisson_sample(5, 7, 7).tolist() == list(range(7))
    assert stream.poisson_sample(5, 1, 1).tolist() == [0]
    assert any(stream.poisson_sample(seed, 9, 1).numel() == 0 for seed in range(10))
    for n, expected in ((7, 0), (7, 8), (0, 0)):
        with pytest.raises(ValueError, match=rf"a sample of range\({n}\) must have an expected size from 1 to {n}"):
            stream.poisson_sample(5, n, expected)
