"""Several queries per step, and the estimators: bits, replay, number of forwards, and non-finite losses."""

import functools
import itertools
import math
import operator
from collections.abc import Callable

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import NonFiniteLossError
from meerkat_engine.engine.lm.text_loss import language_model_loss
from meerkat_engine.engine.weights import MaskedWeights, round_fp32

from helpers.constants import DTYPES
from helpers.losses import BATCH
from helpers.models import make_model
from helpers.tensors import ForbidHostReads, flat_weights, same_bits

ESTIMATORS = ["two-point", "forward-difference", "normalized-difference"]
FORWARDS = {
    "two-point": lambda q: 2 * q, "forward-difference": lambda q: q + 1, "normalized-difference": lambda q: q + 1,
}  # fmt: skip


@pytest.fixture(params=ESTIMATORS)
def estimator(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_optimizer(model: nn.Module, q: int, estimator: str, **keywords: object) -> SparseZO:
    mask = SparseMask.random(model, 0.05, 1)
    return SparseZO(
        model, mask, **{"lr": 0.07, "eps": 1e-2, "seed": 9, "queries": q, "estimator": estimator, **keywords}
    )  # type: ignore[arg-type]


def loss_of(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return language_model_loss(model, BATCH)


def deviation(losses: list[float]) -> float:
    """Standard deviation, rounded to fp32, with plain sums from left to right (``sum`` corrects their rounding)."""
    mean = functools.reduce(operator.add, losses) / len(losses)
    square = functools.reduce(operator.add, [(loss - mean) * (loss - mean) for loss in losses])
    return round_fp32(math.sqrt(round_fp32(square / (len(losses) - 1))))


def enough(q: int, estimator: str) -> int:
    """The number of queries, or the smallest that the estimator takes."""
    return max(q, 2) if estimator == "normalized-difference" else q


def reference_steps(model: nn.Module, q: int, estimator: str, steps: int) -> tuple[list[float], list[float]]:
    """Takes steps by their formulas, with perturb, restore and apply only; returns scalars and losses."""
    opt, scalars, losses = make_optimizer(model, 1, "two-point", lr=0.07 / q), [], []
    for step in range(steps):
        seeds, seen = [stream.step_seed(9, 0, step, j) for j in range(q)], []
        at_w = loss_of(model).item()
        for seed in seeds:
            pair = []
            for scale in (1e-2, -1e-2):
                opt.perturb(seed, scale)
                pair.append(loss_of(model).item())
            seen += pair
        plus, minus = seen[::2], seen[1::2]
        if estimator == "two-point":
            found = [round_fp32((a - b) / (2 * 1e-2)) for a, b in zip(plus, minus, strict=True)]
        elif estimator == "forward-difference":
            found = [round_fp32((a - at_w) / 1e-2) for a in plus]
        else:
            found = [round_fp32((a - at_w) / deviation(plus)) for a in plus]
        opt.restore()
        losses.append(round_fp32(sum(seen) / len(seen)) if estimator == "two-point" else at_w)
        for seed, g in zip(seeds, found, strict=True):
            opt.apply(seed, g)
        scalars += found
    return scalars, losses


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_its_formula(dtype: torch.dtype, q: int, estimator: str) -> None:
    q = enough(q, estimator)
    model, other, base = (make_model("llama", dtype) for _ in range(3))
    opt, calls = make_optimizer(model, q, estimator), []

    def closure() -> torch.Tensor:
        calls.append(None)
        return language_model_loss(model, BATCH)

    losses = opt.step_many([closure] * 3)
    scalars, wanted = reference_steps(other, q, estimator, 3)
    assert len(calls) == 3 * FORWARDS[estimator](q)
    assert opt.projected_gradients == scalars
    assert len(set(scalars)) == 3 * q
    assert [loss.item() for loss in losses] == pytest.approx(wanted, rel=1e-7)  # a sum in another order
    assert same_bits(flat_weights(model), flat_weights(other))
    seeds = [stream.step_seed(9, 0, t, j) for t in range(3) for j in range(q)]
    replay(base, opt.weights.mask, [(seed, 0.07 / q, g) for seed, g in zip(seeds, scalars, strict=True)])
    assert same_bits(flat_weights(base), flat_weights(model))


@pytest.mark.parametrize("backend", ["torch", "numba", pytest.param("triton", marks=pytest.mark.slow)])
def test_bits_do_not_depend_on_step_many_or_given_seeds(backend: str, estimator: str) -> None:
    ends = []
    for many, given in itertools.product((True, False), repeat=2):
        model = make_model("llama", torch.bfloat16)
        opt = make_optimizer(model, 2, estimator, backend=backend)
        seeds = [stream.step_seed(9, 0, t, j) for t in range(2) for j in range(2)]
        closure: Callable[[], torch.Tensor] = lambda model=model: language_model_loss(model, BATCH)  # noqa: E731
        if many:
            opt.step_many([closure] * 2, seeds if given else None)
        else:
            for t in range(2):
                opt.step_many([closure], seeds[2 * t : 2 * t + 2] if given else None)
        ends.append((flat_weights(model), opt.projected_gradients))
    assert all(same_bits(ends[0][0], end) and ends[0][1] == scalars for end, scalars in ends[1:])


def test_the_difference_is_taken_in_float64(llama: nn.Module) -> None:
    plus, at_w, eps = 0.7637010216712952, 0.18783339858055115, 1e-3
    queue = [at_w, plus]
    opt = make_optimizer(llama, 1, "forward-difference", eps=eps)
    assert opt.step(lambda: queue.pop(0)).item() == round_fp32(at_w)
    assert opt.projected_gradients == [round_fp32((round_fp32(plus) - round_fp32(at_w)) / eps)]


def test_scalars_of_equal_losses_are_zero(llama: nn.Module) -> None:
    """Their deviation is 0: the step says nothing, not that its losses are not finite."""
    opt, before = make_optimizer(llama, 3, "normalized-difference"), flat_weights(llama)
    queue = [0.5, 0.25, 0.25, 0.25]
    opt.step(lambda: queue.pop(0))
    assert opt.projected_gradients == [0.0] * 3
    assert same_bits(flat_weights(llama), before)


def test_normalized_scalars_depend_neither_on_eps_nor_on_the_scale_of_the_loss(llama: nn.Module) -> None:
    found = []
    for eps, scale in ((1e-2, 1.0), (1e-3, 1.0), (1e-2, 1024.0)):
        opt, queue = make_optimizer(llama, 2, "normalized-difference", eps=eps), [0.5, 0.25, 0.875]
        opt.step(lambda queue=queue, scale=scale: scale * queue.pop(0))
        found.append(opt.projected_gradients)
    assert found[0] == found[1] == found[2] == [round_fp32(d / deviation([0.25, 0.875])) for d in (-0.25, 0.375)]


def test_updates_share_a_launch_with_the_next_perturbation(
    monkeypatch: pytest.MonkeyPatch, llama: nn.Module, estimator: str
) -> None:
    """A step of one two-point query needs three small launches; its last update shares a launch with the next step."""
    calls: list[str] = []
    for name in ("perturb_", "update_", "update_perturb_", "restore_", "coefficients"):
        operation = getattr(MaskedWeights, name)

        def recording(*args: object, _name: str = name, _do: Callable[..., object] = operation) -> object:
            calls.append(_name)
            return _do(*args)

        monkeypatch.setattr(MaskedWeights, name, recording)
    for q in (enough(1, estimator), 3):
        calls.clear()
        make_optimizer(llama, q, estimator).step_many([lambda: 0.5] * 2)
        two, more = ["perturb_", "perturb_", "coefficients"], ["update_"] * (q - 1)
        if estimator == "two-point":
            query = ["perturb_", "coefficients"]
            wanted = [*two * q, *more, "update_perturb_", *query, *two * (q - 1), *more, "update_"]
        else:
            each = [*["perturb_"] * q, *["coefficients"] * q]
            wanted = [*each, *["update_"] * q, *each, *["update_"] * q]
        assert calls == wanted


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_non_finite_loss_applies_no_query_of_its_step(llama: nn.Module, estimator: str, at: int) -> None:
    n = FORWARDS[estimator](3)
    opt = make_optimizer(llama, 3, estimator)
    queue = [0.1 * i for i in range(n)] + [0.2 * i if i != at else float("nan") for i in range(n)]
    with pytest.raises(NonFiniteLossError, match=r"the loss at (w|[+-]eps) is nan"):
        opt.step_many([lambda: queue.pop(0)] * 2)
    assert (opt.steps, len(opt.projected_gradients)) == (1, 3)
    other = make_model()
    for j, g in enumerate(opt.projected_gradients):
        make_optimizer(other, 3, estimator).apply(stream.step_seed(9, 0, 0, j), g)
    assert same_bits(flat_weights(llama), flat_weights(other))


def test_on_a_gpu_only_the_query_with_a_non_finite_loss_is_not_applied(llama: nn.Module) -> None:
    opt = make_optimizer(llama, 2, "two-point", backend="triton")
    opt._check_immediately = False
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    queue = [one, 2 * one, nan, one, one, 3 * one, one, one]
    opt.step_many([lambda: queue.pop(0)] * 2)
    with pytest.raises(NonFiniteLossError, match="query 1 of step 0 was not applied: mean loss nan"):
        _ = opt.projected_gradients
    g = opt.projected_gradients
    other = make_model()
    replay(other, opt.weights.mask, [
        (stream.step_seed(9, 0, 0, 0), 0.035, g[0]), (stream.step_seed(9, 0, 1, 0), 0.035, g[2]),
    ])  # fmt: skip
    assert same_bits(flat_weights(llama), flat_weights(other))


def test_on_a_gpu_the_host_does_not_wait_in_a_query(llama: nn.Module, estimator: str) -> None:
    opt, other = make_optimizer(llama, 3, estimator, backend="triton"), make_model()
    opt._check_immediately = False
    closure, seeds = (
        (lambda: language_model_loss(llama, BATCH)),
        [stream.step_seed(9, 0, t, j) for t in (0, 1) for j in range(3)],
    )
    with ForbidHostReads():
        opt.step_many([closure] * 2, seeds)
    scalars, _ = reference_steps(other, 3, estimator, 2)
    assert opt.projected_gradients == scalars
    assert same_bits(flat_weights(llama), flat_weights(other))


def test_too_few_seeds_are_rejected(llama: nn.Module) -> None:
    opt = make_optimizer(llama, 2, "two-point")
    with pytest.raises(ValueError, match="a step has 2 queries, each with its own seed"):
        opt.step(lambda: 0.0, seed=3)
    before = flat_weights(llama)
    for seeds in ([], [1]):
        with pytest.raises(ValueError, match=rf"{len(seeds)} seeds were given; 1 steps of 2 queries need 2"):
            opt.step_many([lambda: 0.0], seeds)
    assert same_bits(flat_weights(llama), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": 0}, "queries must be an integer in"),
        ({"q": 1.5}, "queries must be an integer in"),
        ({"estimator": "three-point"}, "unknown estimator 'three-point'; known: two-point, forward-difference, nor"),
        ({"estimator": "normalized-difference"}, "normalized-difference divides by .* at least 2 queries, got 1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_rejected(llama: nn.Module, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(llama, **{"q": 1, "estimator": "two-point", **arguments})  # type: ignore[arg-type]
