"""Steps as programs: the bits of other steps, what a recorded graph would read, and reasons not to record one."""

import copy
import gc
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.engine import captured
from meerkat_engine.engine.captured import BoundLoss

from helpers.graphs import ImitatedGraphs
from helpers.regression import INPUTS, make_mlp, make_step
from helpers.tensors import flat_weights, same_bits

KINDS = {
    "two-point": {},
    "two queries": {"queries": 2},
    "forward difference": {"estimator": "forward-difference", "queries": 2},
    "normalized difference": {"estimator": "normalized-difference", "queries": 3},
    "skip": {"nonfinite": "skip"},
}


@dataclass(frozen=True)
class Batch:
    x: Tensor
    scale: int
    part: dict[str, Any]


def make_batch(i: int, rows: int = 4) -> Batch:
    return Batch(INPUTS[:rows] * (i + 1), 2, {"shift": torch.tensor(float(i)), "none": None})


def loss_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        x = batch.x.to(next(model.parameters()).dtype)
        return (model(x).float() * batch.scale - batch.part["shift"]).square().mean()

    return loss


class Run:
    """One optimizer, whose steps are programs or not.

    Args:
        how: "closures", "programs" or "graphs" (recorded and replayed).
        dtype: dtype of the weights.
        options: of the optimizer.
    """

    def __init__(self, how: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.how, self.model = how, make_mlp(dtype)
        options = {"backend": "torch", "lr": 0.1} | options
        self.opt = SparseZO(self.model, SparseMask.random(self.model, 0.3, seed=1), **options)
        self.graphs = ImitatedGraphs(self.opt) if how == "graphs" else None
        self.loss = loss_of(self.model)
        self.losses: list[Tensor] = []

    def steps(self, batches: list[Batch], loss: Callable[[Batch], Any] | None = None) -> None:
        loss = loss or self.loss
        closures = [
            (lambda batch=batch: loss(batch)) if self.how == "closures" else BoundLoss(loss, batch) for batch in batches
        ]
        self.losses += self.opt.step_many(closures)

    def check_equal(self, other: "Run") -> None:
        assert self.opt.projected_gradients == pytest.approx(other.opt.projected_gradients, abs=0, rel=0, nan_ok=True)
        assert same_bits(flat_weights(self.model), flat_weights(other.model))
        assert same_bits(self.opt.weights.masters(), other.opt.weights.masters())
        assert same_bits(torch.stack(self.losses), torch.stack(other.losses))


def same_log(a: Run, b: Run) -> bool:
    """Whether two runs have the same log; NaN equals itself."""
    return repr(a.opt.log) == repr(b.opt.log)


def runs(how: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Run, Run]:
    return Run("closures", dtype, **options), Run(how, dtype, **options)


@pytest.mark.parametrize(
    ("kind", "how", "dtype"),
    [(kind, how, dtype) for kind in KINDS for how, dtype in (("programs", torch.float32), ("graphs", torch.bfloat16))],
)
def test_a_program_reads_seeds_rates_eps_and_inputs_anew_in_every_step(kind: str, how: str, dtype: torch.dtype) -> None:
    pair = runs(how, dtype, **KINDS[kind])
    for run in pair:
        group = run.opt.param_groups[0]
        run.steps([make_batch(i) for i in range(4)])
        group["lr"] = 0.03
        run.steps([make_batch(i, rows) for i in (5, 3, 8) for rows in (4, 2)])
        group["eps"] = 2e-3
        run.steps([make_batch(9)])
        run.opt.step(BoundLoss(run.loss, make_batch(2)), seed=list(range(7, 7 + run.opt.queries)))
    pair[1].check_equal(pair[0])
    assert same_log(*pair)
    assert len(set(pair[0].opt.projected_gradients)) > 9
    graphs = pair[1].graphs
    if graphs is not None:
        assert (graphs.recorded, graphs.replayed, pair[1].opt.captured_steps) == (2, 10, 10)
        assert pair[1].opt.not_captured is None


def test_kernels_read_the_values_of_a_graph() -> None:
    pair = runs("graphs", torch.bfloat16, backend="triton")
    for run in pair:
        run.steps([make_batch(i) for i in range(3)])
    pair[1].check_equal(pair[0])
    assert pair[1].opt.captured_steps == 2


def test_each_parameter_group_has_its_own_rate_in_a_graph() -> None:
    pair = []
    for how in ("closures", "graphs"):
        model = make_mlp()
        run = Run.__new__(Run)
        run.how, run.model, run.loss, run.losses = how, model, loss_of(model), []
        params = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters()}]
        mask = SparseMask.random(model, 0.3, seed=1)
        run.opt = SparseZO(model, mask, lr=0.1, backend="torch", params=params)
        run.graphs = ImitatedGraphs(run.opt) if how == "graphs" else None
        run.steps([make_batch(i) for i in range(3)])
        run.opt.param_groups[1]["lr"] = 0.4
        run.steps([make_batch(i) for i in range(3)])
        pair.append(run)
    pair[1].check_equal(pair[0])
    assert pair[1].opt.captured_steps == 5


def test_inputs_may_be_changed_in_place_between_steps() -> None:
    pair = runs("graphs")
    for run in pair:
        batch = make_batch(0)
        for _ in range(4):
            batch.x.add_(0.25)
            run.steps([batch])
    pair[1].check_equal(pair[0])
    assert pair[1].opt.captured_steps == 3


def test_expanded_inputs_stay_expanded() -> None:
    seen = []

    def loss(x: Tensor) -> Tensor:
        seen.append(x.stride())
        return x.sum() * 0 + 1

    opt, _ = make_step(make_mlp())
    ImitatedGraphs(opt)
    opt.step_many([BoundLoss(loss, torch.full((3, 1), float(i)).expand(3, 5)) for i in range(3)])
    assert seen == [(1, 0)] * 5  # two calls, two that were recorded, and one to compare with
    assert opt.captured_steps == 2


@pytest.mark.parametrize("how", ["programs", "graphs"])
def test_an_update_without_effect_leaves_negative_zeros_alone(how: str) -> None:
    """A program begins with an update also where there is none; subtracting 0 would turn -0 into 0."""
    run = Run(how, nonfinite="skip")
    for p in run.model.parameters():
        p.data.fill_(-0.0)
    run.opt.reload()
    if how == "graphs":
        ImitatedGraphs(run.opt)
    for _ in range(3):
        run.steps([Batch(torch.full((4, 8), math.nan), 2, {"shift": torch.tensor(0.0), "none": None})])
    assert torch.signbit(run.opt.weights.masters()).all()
    assert torch.signbit(flat_weights(run.model)).all()
    assert run.opt.steps == 3
    assert all(map(math.isnan, run.opt.projected_gradients))


def test_graphs_outlive_loaded_masters_and_applied_updates() -> None:
    """Between the rounds of a federation the masters are put back; the graphs must write to where they are."""
    pair = runs("graphs")
    for run in pair:
        run.steps([make_batch(i) for i in range(3)])
        state = copy.deepcopy(run.opt.state_dict())
        run.steps([make_batch(i) for i in range(2)])
        run.opt.load_state_dict(state)
        run.steps([make_batch(7)])
        run.opt.apply(5, 0.5)
        run.opt.perturb(3, 1e-2)
        run.opt.restore()
        run.steps([make_batch(6)])
    assert same_log(*pair)
    for run in pair:
        run.opt.weights.replay_([1, 2], [0.1, -0.1])
        run.steps([make_batch(4)])
    pair[1].check_equal(pair[0])
    assert pair[1].graphs is not None
    assert pair[1].graphs.recorded == 1
    assert pair[1].opt.captured_steps == 7


def test_hooks_between_captured_steps_see_restored_weights() -> None:
    seen: list[list[Tensor]] = []
    pair = runs("graphs")
    for run in pair:
        weights: list[Tensor] = []
        run.opt.register_step_post_hook(lambda *_, run=run, weights=weights: weights.append(flat_weights(run.model)))  # type: ignore[misc]
        run.steps([make_batch(i) for i in range(4)])
        seen.append(weights)
    pair[1].check_equal(pair[0])
    assert len(seen[0]) == 4
    assert all(same_bits(a, b) for a, b in zip(*seen, strict=True))


def test_a_captured_run_replays_from_its_log() -> None:
    run = Run("graphs", torch.bfloat16)
    base = copy.deepcopy(run.model)
    run.steps([make_batch(i) for i in range(6)])
    replay(base, run.opt.weights.mask, run.opt.log, "torch")
    assert same_bits(flat_weights(base), flat_weights(run.model))


def test_a_loss_that_is_not_finite_in_a_captured_step_is_skipped() -> None:
    pair = runs("graphs", nonfinite="skip")
    for run in pair:
        bad = make_batch(2)
        bad.x[1, 1] = math.nan
        run.steps([make_batch(0), make_batch(1), bad, make_batch(3)])
    pair[1].check_equal(pair[0])
    assert [math.isnan(g) for g in pair[1].opt.projected_gradients] == [False, False, True, False]


def reads_a_value(run: Run) -> Callable[[Batch], Any]:
    return lambda batch: run.loss(batch) * (batch.x.sum().item() < 1e9)


def returns_a_number(run: Run) -> Callable[[Batch], Any]:
    return lambda batch: 0.5


def counts(run: Run) -> Callable[[Batch], Any]:
    calls = []
    return lambda batch: [calls.append(1), run.loss(batch) + len(calls)][1]


def raises_while_it_is_recorded(run: Run) -> Callable[[Batch], Any]:
    def loss(batch: Batch) -> Tensor:
        if torch.utils._python_dispatch.is_in_torch_dispatch_mode():
            raise NotImplementedError("first line\nsecond line")
        return run.loss(batch)

    return loss


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (reads_a_value, "recording it raised RuntimeError: operation not permitted when stream is capturing"),
        (returns_a_number, "recording it raised TypeError: it returns a float, which every replay would return again"),
        (
            counts,
            "the recorded loss is .*, the next call of the function at the same weights gives .*: it depends on",
        ),
        (raises_while_it_is_recorded, "recording it raised NotImplementedError: first line$"),
    ],
)
def test_a_step_that_cannot_be_captured_is_taken_all_the_same(make: Callable[[Run], Any], reason: str) -> None:
    pair = runs("graphs")
    losses = [make(run) for run in pair]
    pair[0].steps([make_batch(i) for i in range(4)], losses[0])
    with pytest.warns(UserWarning, match="not captured as a CUDA graph") as caught:
        pair[1].steps([make_batch(i) for i in range(4)], losses[1])
    assert len(caught) == 1
    assert pair[1].opt.captured_steps == 0
    assert pair[1].opt.not_captured is not None
    assert re.search(reason, pair[1].opt.not_captured)
    if make is not counts:  # it is called more often, so its losses differ
        pair[1].check_equal(pair[0])
    assert pair[1].opt.steps == 4
    pair[1].steps([make_batch(i) for i in range(3)])  # another loss is not concerned
    assert pair[1].opt.captured_steps == 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (object(), "its inputs hold a object; they may be tensors, constants, and tuples"),
        ({"model": make_mlp()}, "its inputs hold a Sequential"),
        (torch.eye(2).to_sparse(), "its inputs hold a tensor of layout torch.sparse_coo"),
    ],
    ids=["object", "module", "sparse"],
)
def test_inputs_that_cannot_be_copied_are_passed_on(value: object, reason: str) -> None:
    opt, closure = make_step(make_mlp())
    graphs = ImitatedGraphs(opt)
    wanted, wanted_closure = make_step(make_mlp())
    with pytest.warns(UserWarning, match="not captured as a CUDA graph: its inputs hold"):
        opt.step_many([BoundLoss(lambda _: closure(), value)] * 3)
    wanted.step_many([wanted_closure] * 3)
    assert opt.projected_gradients == wanted.projected_gradients
    assert reason in str(opt.not_captured)
    assert graphs.recorded == 0


def test_a_loss_without_a_hash_is_called_like_any_other() -> None:
    @dataclass
    class Loss:  # a dataclass that compares has no hash
        run: Run

        def __call__(self, batch: Batch) -> Tensor:
            return self.run.loss(batch)

    pair = runs("graphs")
    pair[0].steps([make_batch(i) for i in range(3)])
    with pytest.warns(UserWarning, match="not captured as a CUDA graph: unhashable type: 'Loss'") as caught:
        pair[1].steps([make_batch(i) for i in range(3)], Loss(pair[1]))
    pair[1].check_equal(pair[0])
    assert len(caught) == 1


def test_graphs_beyond_the_bound_are_dropped_and_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MAX_PROGRAMS", 2)
    pair = runs("graphs")
    rows = [4, 4, 3, 3, 2, 2, 4, 4, 4]
    pair[0].steps([make_batch(i, n) for i, n in enumerate(rows)])
    with pytest.warns(UserWarning, match="inputs of more than 2 shapes.*; pad the inputs to fewer shapes") as caught:
        pair[1].steps([make_batch(i, n) for i, n in enumerate(rows)])
    pair[1].check_equal(pair[0])
    assert len(caught) == 1
    assert pair[1].graphs is not None
    assert (pair[1].graphs.recorded, pair[1].opt.captured_steps) == (4, 5)
    assert len(pair[1].opt._captured._programs) == 2


def replace_bias(model: nn.Module) -> None:
    model[0].register_parameter("bias", nn.Parameter(torch.full((16,), 0.5)))  # type: ignore[index]


def move_bias(model: nn.Module) -> None:
    model[0].bias.data = torch.full((16,), 0.5)  # type: ignore[index]


def replace_module(model: nn.Module) -> None:
    model[0] = nn.Linear(model[0].in_features, 16)  # type: ignore[index, operator]
    for p in model[0].parameters():  # type: ignore[index]
        p.data.fill_(0.25)


def remove_or_add_bias(model: nn.Module) -> None:
    bias = nn.Parameter(torch.full((16,), 0.5)) if model[0].bias is None else None  # type: ignore[index]
    model[0].register_parameter("bias", bias)  # type: ignore[index]


@pytest.mark.parametrize("change", [replace_bias, move_bias, replace_module, remove_or_add_bias])
def test_a_part_of_the_model_that_moved_is_noticed(change: Callable[[nn.Module], None]) -> None:
    """A graph would read the old one. Only masked parameters may not be moved."""
    results = []
    for how in ("closures", "graphs"):
        model = make_mlp()
        mask = SparseMask.of_parameters(model, ["2.weight"])
        opt = SparseZO(model, mask, lr=0.1, backend="torch")
        graphs = ImitatedGraphs(opt) if how == "graphs" else None
        loss = loss_of(model)
        for _ in range(2):
            opt.step_many([BoundLoss(loss, make_batch(i)) for i in range(3)])
            change(model)
            opt.step_many([BoundLoss(loss, make_batch(i)) for i in range(3)])
        results.append(opt.projected_gradients)
    assert results[0] == results[1]
    assert graphs is not None
    assert graphs.recorded == 3


@pytest.mark.parametrize("inside", ["the optimizer", "the first step"])
@pytest.mark.parametrize("how", ["programs", "graphs"])
def test_what_was_made_in_inference_mode_serves_outside_of_it(how: str, inside: str) -> None:
    plain, run = runs(how)
    if inside == "the optimizer":
        with torch.inference_mode():
            run.opt = SparseZO(run.model, run.opt.weights.mask, lr=0.1, backend="torch")
        run.graphs = ImitatedGraphs(run.opt) if how == "graphs" else None
    for number in range(4):
        plain.steps([make_batch(number)])
        with torch.inference_mode(inside == "the first step" and number == 0):
            run.steps([make_batch(number)])
    run.check_equal(plain)


def test_functions_that_never_come_twice_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MAX_PROGRAMS", 2)
    run = Run("graphs")
    closures = [BoundLoss(loss_of(run.model), make_batch(number)) for number in range(6)]
    with pytest.warns(UserWarning, match="pass the same function in every step") as caught:
        run.opt.step_many(closures)
    assert (len(caught), run.opt.captured_steps) == (1, 0)
    assert "as many functions" in str(run.opt.not_captured)


def test_masters_in_other_memory_are_noticed() -> None:
    run = Run("graphs")
    run.steps([make_batch(i) for i in range(3)])
    groups = run.opt.weights._launch_groups
    assert run.opt._captured._memory is not None
    assert run.opt._captured._memory.is_the_same()
    run.opt.weights._launch_groups = [copy.copy(group) for group in groups]
    assert not run.opt._captured._memory.is_the_same()


def test_another_mode_is_another_graph() -> None:
    run = Run("graphs")
    for train in (False, True, False):
        run.model.train(train)
        run.steps([make_batch(i) for i in range(2)])
    assert run.graphs is not None
    assert run.graphs.recorded == 2
    with torch.autocast("cpu", torch.bfloat16):
        run.steps([make_batch(i) for i in range(2)])
    assert run.graphs.recorded == 3


def test_debug_and_capture_off_take_no_programs() -> None:
    for options, reason in (({"debug": True}, "with debug=True, all passes look"), ({"capture": "off"}, None)):
        pair = runs("programs", **options)
        for run in pair:
            run.steps([make_batch(i) for i in range(3)])
        pair[1].check_equal(pair[0])
        assert pair[1].opt._captured._programs == {}
        assert (pair[1].opt.not_captured or "").startswith(reason or "")
        assert (pair[1].opt.not_captured is None) == (reason is None)
    with pytest.raises(ValueError, match="unknown choice capture='on'; known: auto, off"):
        make_step(make_mlp(), capture="on")


def test_nothing_is_said_where_nothing_could_be_captured() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run("programs", debug=True)
        run.steps([make_batch(0)])


def test_an_optimizer_with_programs_is_freed_with_its_last_reference() -> None:
    run = Run("programs")
    run.steps([make_batch(i) for i in range(3)])
    gc.disable()
    try:
        reference = weakref.ref(run.opt)
        del run
        assert reference() is None
    finally:
        gc.enable()


def test_a_bound_loss_is_a_closure() -> None:
    assert BoundLoss(lambda a, b: a + b, torch.ones(()), 2)() == 3
    with pytest.raises(TypeError, match="a BoundLoss needs a function that computes the loss, got Tensor"):
        BoundLoss(torch.ones(()))  # type: ignore[arg-type]


def test_a_compiled_model_takes_programs_like_another() -> None:
    pair = runs("programs")
    for run in pair:
        run.loss = loss_of(torch.compile(run.model, backend="eager"))  # type: ignore[arg-type]
        run.steps([make_batch(i) for i in range(3)])
    pair[1].check_equal(pair[0])


@pytest.mark.parametrize("launched", [False, True])
def test_an_interrupt_around_a_replay_neither_loses_nor_doubles_its_update(launched: bool) -> None:
    """Kernels apply an update as often as they are launched: whether a replay has come so far must be looked up."""
    pair = [Run("graphs", backend="triton") for _ in range(2)]
    for run in pair:
        run.steps([make_batch(i) for i in range(2)])
    (program,) = pair[1].opt._captured._programs.values()
    recorded = program.replay
    assert recorded is not None

    def interrupted() -> None:
        if launched:
            recorded()
        raise KeyboardInterrupt

    def batches() -> Iterator[BoundLoss]:
        yield BoundLoss(pair[1].loss, make_batch(2))
        program.replay = interrupted  # there is an update of the step before
        yield BoundLoss(pair[1].loss, make_batch(3))

    with pytest.raises(KeyboardInterrupt):
        pair[1].opt.step_many(batches())
    assert pair[1].opt.steps == 3
    program.replay = recorded
    pair[0].steps([make_batch(i) for i in (2, 3)])
    pair[1].opt.step_many([BoundLoss(pair[1].loss, make_batch(3))])
    assert pair[1].opt.projected_gradients == pair[0].opt.projected_gradients
    assert same_bits(pair[1].opt.weights.masters(), pair[0].opt.weights.masters())
