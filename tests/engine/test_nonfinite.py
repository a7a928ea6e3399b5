"""Skipped queries in a run that continues: ``SparseZO(nonfinite="skip")`` and its replay."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.engine import stream
from meerkat_engine.engine.lm.text_loss import language_model_loss
from meerkat_engine.engine.weights import round_fp32

from helpers.losses import BATCH
from helpers.models import make_model
from helpers.tensors import flat_weights, same_bits

# Triton's interpreter computes with numpy, which warns about the values that these tests use on purpose
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

NAN, INF = float("nan"), float("inf")
MAX = 3e38  # +MAX and -MAX are finite, their difference over 2 eps is not


@pytest.fixture(params=["torch", "numba", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def skipping_optimizer(model: nn.Module, **more: object) -> SparseZO:
    mask = SparseMask.random(model, 0.05, 1)
    return SparseZO(model, mask, **{"lr": 0.1, "eps": 1e-2, "seed": 9, "nonfinite": "skip", **more})  # type: ignore[arg-type]


def closure_with_bad_losses(
    model: nn.Module, bad_losses: dict[int, float]
) -> tuple[Callable[[], torch.Tensor], list[None]]:
    """Makes a closure that returns the given losses at some calls, else the model's loss; and the list of its calls."""
    calls: list[None] = []

    def closure() -> torch.Tensor:
        calls.append(None)
        loss = language_model_loss(model, BATCH)
        return torch.full_like(loss, bad_losses[len(calls) - 1]) if len(calls) - 1 in bad_losses else loss

    return closure, calls


@pytest.mark.parametrize(
    ("dtype", "estimator", "q"),
    [(torch.float32, "two-point", 1), (torch.bfloat16, "two-point", 2), (torch.float16, "forward-difference", 2)],
    ids=str,
)
def test_a_run_with_skipped_steps_replays_to_the_same_bits(
    dtype: torch.dtype, estimator: str, q: int, backend: str
) -> None:
    model, base = make_model("llama", dtype), make_model("llama", dtype)
    opt = skipping_optimizer(model, backend=backend, estimator=estimator, queries=q)
    # the last query of steps 0 and 2 is skipped; a step's other queries are applied
    calls_per_step = 2 * q if estimator == "two-point" else q + 1
    closure, calls = closure_with_bad_losses(model, {calls_per_step - 1: NAN, 3 * calls_per_step - 1: INF})
    opt.step_many([closure] * 4)
    assert len(calls) == 4 * calls_per_step
    assert opt.steps == 4
    g = opt.projected_gradients
    skipped = [i for i, scalar in enumerate(g) if math.isnan(scalar)]
    assert skipped == [q - 1, 3 * q - 1]
    assert all(math.isfinite(scalar) and scalar for i, scalar in enumerate(g) if i not in skipped)
    seeds = [stream.step_seed(9, 0, t, j) for t in range(4) for j in range(q)]
    log = [(seed, 0.1 / q, scalar) for seed, scalar in zip(seeds, g, strict=True)]
    replay(base, opt.weights.mask, log, backend=backend)
    assert same_bits(flat_weights(base), flat_weights(model))
    without_skipped = make_model("llama", dtype)
    replay(without_skipped, opt.weights.mask, [update for i, update in enumerate(log) if i not in skipped])
    assert same_bits(flat_weights(without_skipped), flat_weights(model))


@pytest.mark.parametrize(
    ("lr", "losses"),
    [
        (0.1, [NAN, 1.0]),
        (0.1, [1.0, NAN]),
        (0.1, [INF, 1.0]),
        (0.1, [INF, INF]),
        (0.1, [1e39, 1.0]),
        (0.1, [MAX, -MAX]),
        (1e10, [1e30, 0.0]),
        (0.0, [INF, 0.0]),
    ],
    ids=["nan", "nan at -eps", "inf", "inf - inf", "no fp32", "g overflows", "lr * g overflows", "lr is 0"],
)
def test_a_query_with_a_non_finite_value_is_skipped(backend: str, lr: float, losses: list[float]) -> None:
    model = make_model()
    before, queue = flat_weights(model), list(losses)
    opt = skipping_optimizer(model, lr=lr, backend=backend)
    loss = opt.step(lambda: queue.pop(0))
    assert queue == []
    assert same_bits(flat_weights(model), before)
    assert opt.steps == 1
    assert [math.isnan(g) for g in opt.projected_gradients] == [True]
    mean = round_fp32(sum(map(round_fp32, losses)) / 2)
    assert loss.item() == mean or (math.isnan(mean) and math.isnan(loss.item()))
    opt.param_groups[0]["lr"] = 0.1
    opt.step(lambda: language_model_loss(model, BATCH))
    assert math.isfinite(opt.projected_gradients[1])
    assert not same_bits(flat_weights(model), before)


def test_a_bad_loss_at_w_skips_all_queries_of_its_step(llama: nn.Module) -> None:
    opt = skipping_optimizer(llama, estimator="forward-difference", queries=3)
    before, queue = flat_weights(llama), [INF, 0.1, 0.2, 0.3]
    assert opt.step(lambda: queue.pop(0)).item() == INF
    assert queue == []
    assert all(math.isnan(g) for g in opt.projected_gradients)
    assert len(opt.projected_gradients) == 3
    assert same_bits(flat_weights(llama), before)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", range(4))
def test_a_bad_loss_skips_all_queries_of_a_normalized_step(llama: nn.Module, at: int, bad: float) -> None:
    opt = skipping_optimizer(llama, estimator="normalized-difference", queries=3)
    before, queue = flat_weights(llama), [0.4, 0.1, 0.2, 0.3]
    queue[at] = bad
    opt.step(lambda: queue.pop(0))
    assert queue == []
    assert len(opt.projected_gradients) == 3
    assert all(math.isnan(g) for g in opt.projected_gradients)
    assert same_bits(flat_weights(llama), before)


def test_a_query_is_applied_in_all_groups_or_in_none(backend: str) -> None:
    model = make_model()
    before, (first, *rest) = flat_weights(model), model.parameters()
    opt = skipping_optimizer(model, backend=backend, params=[{"params": [first], "lr": 1e10}, {"params": rest}])
    queue = [1e30, 0.0]  # lr * g fits fp32 only in the second group
    opt.step(lambda: queue.pop(0))
    assert [math.isnan(g) for g in opt.projected_gradients] == [True]
    assert same_bits(flat_weights(model), before)


def test_finite_steps_are_the_same_with_skip_and_raise(backend: str) -> None:
    ends = []
    for nonfinite, many in itertools.product(("raise", "skip"), (True, False)):
        model = make_model("llama", torch.bfloat16)
        opt = skipping_optimizer(model, nonfinite=nonfinite, backend=backend)
        closure, _ = closure_with_bad_losses(model, {})
        losses = opt.step_many([closure] * 2) if many else [opt.step(closure) for _ in range(2)]
        ends.append((flat_weights(model), torch.stack(losses), torch.tensor(opt.projected_gradients)))
    for end in ends[1:]:
        assert all(same_bits(a, b) for a, b in zip(end, ends[0], strict=True))


def test_replay_of_only_skipped_steps_changes_nothing(llama: nn.Module, backend: str) -> None:
    before = flat_weights(llama)
    replay(llama, SparseMask.random(llama, 0.05, 1), [(1, 0.1, NAN), (2, 0.1, NAN)], backend=backend)
    assert same_bits(flat_weights(llama), before)
    for lr, g in ((0.1, INF), (0.1, -INF), (NAN, NAN), (INF, 1.0)):
        with pytest.raises(ValueError, match="lr and projected gradient must be finite"):
            replay(llama, SparseMask.random(llama, 0.05, 1), [(1, 0.1, 1.0), (2, lr, g)])
    assert same_bits(flat_weights(llama), before)


def test_an_unknown_nonfinite_choice_is_rejected(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="unknown choice nonfinite='ignore'; known: raise, skip"):
        skipping_optimizer(llama, nonfinite="ignore")
