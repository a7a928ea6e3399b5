"""Steps that are not taken, and the run that goes on: ``SparseZO(nonfinite="skip")`` and its replay."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.engine import stream
from meerkat_engine.engine.lm.objective import language_model_loss
from meerkat_engine.engine.weights import round_fp32

from helpers.losses import BATCH
from helpers.models import make_model
from helpers.tensors import flat_weights, same_bits

# numpy, which Triton's interpreter computes with, warns of what the kernels are made for
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

NAN, INF = float("nan"), float("inf")
MAX = 3e38  # +MAX and -MAX are finite, their difference over 2 eps is not


@pytest.fixture(params=["torch", "numba", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def skipping(model: nn.Module, **more: object) -> SparseZO:
    mask = SparseMask.random(model, 0.05, 1)
    return SparseZO(model, mask, **{"lr": 0.1, "eps": 1e-2, "seed": 9, "nonfinite": "skip", **more})  # type: ignore[arg-type]


def spoilt(model: nn.Module, bad: dict[int, float]) -> tuple[Callable[[], torch.Tensor], list[None]]:
    """The model's loss, but at some calls a number of ours; and the calls so far."""
    calls: list[None] = []

    def closure() -> torch.Tensor:
        calls.append(None)
        loss = language_model_loss(model, BATCH)
        return torch.full_like(loss, bad[len(calls) - 1]) if len(calls) - 1 in bad else loss

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
    opt = skipping(model, backend=backend, estimator=estimator, queries=q)
    # the last query of steps 0 and 2; of several queries, the others of a step are taken
    each = 2 * q if estimator == "two-point" else q + 1
    closure, calls = spoilt(model, {each - 1: NAN, 3 * each - 1: INF})
    opt.step_many([closure] * 4)
    assert len(calls) == 4 * each
    assert opt.steps == 4
    g = opt.projected_gradients
    missing = [i for i, each in enumerate(g) if math.isnan(each)]
    assert missing == [q - 1, 3 * q - 1]
    assert all(math.isfinite(each) and each for i, each in enumerate(g) if i not in missing)
    seeds = [stream.step_seed(9, 0, t, j) for t in range(4) for j in range(q)]
    log = [(seed, 0.1 / q, each) for seed, each in zip(seeds, g, strict=True)]
    replay(base, opt.weights.mask, log, backend=backend)
    assert same_bits(flat_weights(base), flat_weights(model))
    taken = make_model("llama", dtype)
    replay(taken, opt.weights.mask, [each for i, each in enumerate(log) if i not in missing])
    assert same_bits(flat_weights(taken), flat_weights(model))


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
def test_what_is_not_taken(backend: str, lr: float, losses: list[float]) -> None:
    model = make_model()
    before, queue = flat_weights(model), list(losses)
    opt = skipping(model, lr=lr, backend=backend)
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
    opt = skipping(llama, estimator="forward-difference", queries=3)
    before, queue = flat_weights(llama), [INF, 0.1, 0.2, 0.3]
    assert opt.step(lambda: queue.pop(0)).item() == INF
    assert queue == []
    assert all(math.isnan(g) for g in opt.projected_gradients)
    assert len(opt.projected_gradients) == 3
    assert same_bits(flat_weights(llama), before)


def test_a_query_is_taken_in_all_groups_or_in_none(backend: str) -> None:
    model = make_model()
    before, (first, *rest) = flat_weights(model), model.parameters()
    opt = skipping(model, backend=backend, params=[{"params": [first], "lr": 1e10}, {"params": rest}])
    queue = [1e30, 0.0]  # lr * g fits fp32 in the second group alone
    opt.step(lambda: queue.pop(0))
    assert [math.isnan(g) for g in opt.projected_gradients] == [True]
    assert same_bits(flat_weights(model), before)


def test_steps_without_a_bad_loss_are_those_that_raise(backend: str) -> None:
    ends = []
    for nonfinite, many in itertools.product(("raise", "skip"), (True, False)):
        model = make_model("llama", torch.bfloat16)
        opt = skipping(model, nonfinite=nonfinite, backend=backend)
        closure, _ = spoilt(model, {})
        losses = opt.step_many([closure] * 2) if many else [opt.step(closure) for _ in range(2)]
        ends.append((flat_weights(model), torch.stack(losses), torch.tensor(opt.projected_gradients)))
    for end in ends[1:]:
        assert all(same_bits(a, b) for a, b in zip(end, ends[0], strict=True))


def test_replay_of_nothing_but_skipped_steps_moves_nothing(llama: nn.Module, backend: str) -> None:
    before = flat_weights(llama)
    replay(llama, SparseMask.random(llama, 0.05, 1), [(1, 0.1, NAN), (2, 0.1, NAN)], backend=backend)
    assert same_bits(flat_weights(llama), before)
    for lr, g in ((0.1, INF), (0.1, -INF), (NAN, NAN), (INF, 1.0)):
        with pytest.raises(ValueError, match="lr and projected gradient must be finite"):
            replay(llama, SparseMask.random(llama, 0.05, 1), [(1, 0.1, 1.0), (2, lr, g)])
    assert same_bits(flat_weights(llama), before)


def test_an_unknown_choice_is_refused(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="unknown choice nonfinite='ignore'; known: raise, skip"):
        skipping(llama, nonfinite="ignore")
