"""``SparseZO`` among what torch does with optimizers: copies, hooks, schedules, states, defaults, compilers."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from meerkat_engine import SparseMask, SparseZO, replay, stream
from meerkat_engine.engine.errors import ModelChangedError

from helpers.regression import INPUTS, cast_masters, live_weights, make_mlp, make_step
from helpers.tensors import flat_weights, same_bits


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_copies_are_refused(copying: Callable[[object], object]) -> None:
    opt, _ = make_step(make_mlp())
    with pytest.raises(TypeError, match=r"cannot be copied or pickled; save state_dict\(\)"):
        copying(opt)


@pytest.mark.parametrize(
    "seed", [np.uint64(2**63 + 5), np.int32(7), torch.tensor(7)], ids=["uint64", "int32", "tensor"]
)
def test_integers_of_numpy_and_torch_are_seeds(seed: Any) -> None:
    models = make_mlp(), make_mlp()
    for model, value in zip(models, (seed, int(seed)), strict=True):
        opt, closure = make_step(model, seed=value)
        opt.step(closure)
        opt.step_many([closure], [value])
        opt.step(closure, seed=[value])
        opt.apply(value, 0.5)
        assert [type(update[0]) for update in opt.log.updates] == [int] * 4
    assert same_bits(*map(flat_weights, models))
    assert stream.step_seed(seed, 0, 1) == stream.step_seed(int(seed), 0, 1)


@pytest.mark.parametrize("seed", [1.5, "7", None, torch.tensor([1.0])], ids=str)
def test_other_seeds_are_rejected(seed: Any) -> None:
    with pytest.raises(TypeError, match="seed must be an integer"):
        make_step(make_mlp(), seed=seed)


@contextmanager
def default(kind: str) -> Iterator[None]:
    """Context with another default device or dtype of torch."""
    before = torch.get_default_dtype()
    torch.set_default_device("meta" if kind == "meta" else None)
    torch.set_default_dtype(before if kind == "meta" else getattr(torch, kind))
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["meta", "float64", "bfloat16"])
@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_defaults_of_torch_do_not_change_a_step(kind: str, backend: str) -> None:
    found = []
    for other in (kind, "float32"):
        model, inputs = make_mlp(), INPUTS.clone()
        closure = lambda model=model, inputs=inputs: model(inputs).square().mean()  # noqa: E731
        with default(other):
            opt = SparseZO(model, SparseMask.random(model, 0.3, seed=1), lr=0.1, backend=backend)
            opt.step(closure)
            opt.step_many([closure] * 2, [5, 6])
            opt.apply(3, 0.5)
            opt.perturb(4, 1e-3)
            opt.restore()
            opt.load_state_dict(opt.state_dict())
            opt.reload()
            opt.step(closure)
            found.append((opt.projected_gradients, opt.log.end, opt.unchanged_fraction()))
    assert found[0] == found[1]


def test_hooks_of_a_step_run_with_restored_weights_in_step_many() -> None:
    models = make_mlp(), make_mlp()
    (opt, closure), (single, single_closure) = (make_step(model) for model in models)
    seen: list[tuple[str, torch.Tensor]] = []
    for name, register in (("pre", opt.register_step_pre_hook), ("post", opt.register_step_post_hook)):
        register(lambda *_, _name=name: seen.append((_name, live_weights(opt))))  # type: ignore[misc]
    opt.step_many([closure] * 3)
    wanted = []
    for _ in range(3):
        wanted.append(("pre", live_weights(single)))
        single.step(single_closure)
        wanted.append(("post", live_weights(single)))
    assert [name for name, _ in seen] == [name for name, _ in wanted]
    assert all(same_bits(a, b) for (_, a), (_, b) in zip(seen, wanted, strict=True))
    assert same_bits(*map(flat_weights, models))


def test_schedulers_count_the_steps_of_step_many() -> None:
    opt, closure = make_step(make_mlp())
    scheduler = StepLR(opt, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step_many([closure] * 2)
        scheduler.step()
    opt.step(closure)
    assert [update[1] for update in opt.log.updates] == [0.1, 0.1, 0.05]


def test_what_state_hooks_add_is_kept() -> None:
    opt, closure = make_step(make_mlp())
    opt.step(closure)
    opt.register_state_dict_post_hook(lambda opt, state: state["state"].update(extra=5))
    state = opt.state_dict()
    other, _ = make_step(make_mlp())
    seen = []
    other.register_load_state_dict_pre_hook(lambda opt, state: seen.append(state["state"]["extra"]))
    other.register_load_state_dict_post_hook(lambda opt: seen.append(opt.steps))
    other.load_state_dict(state)
    assert seen == [5, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["state"]["masters"].__setitem__(2, float("nan")), "finite; position 2 holds nan"),
        (lambda state: state["state"].update(masters=state["state"]["masters"][1:]), r"masters must be float32 \[48\]"),
        (lambda state: state["state"].update(mask_digest="other"), "mask_digest"),
        (lambda state: state["state"].update(stream_version=2), "stream_version is 2"),
        (lambda state: state["state"].update(queries=2), "the state's queries is 2, this optimizer's is 1"),
        (lambda state: state["state"].update(estimator="forward-difference"), "estimator is 'forward-difference'"),
        (lambda state: state["state"].update(eps=0.1), "the state's eps is 0.1, this optimizer's is 0.001"),
        (lambda state: state["param_groups"][0].update(lr=-1.0), "lr must be finite and not negative"),
        (lambda state: state["param_groups"][0].update(eps=0.0), "eps must be finite and positive"),
    ],
)  # fmt: skip
def test_a_state_is_checked_before_anything_of_it_is_taken(change: Callable[[Any], None], message: str) -> None:
    model = make_mlp()
    opt, closure = make_step(model)
    opt.step(closure)
    before = opt.state_dict()
    state = make_step(make_mlp(seed=5))[0].state_dict()
    state["param_groups"][0]["lr"] = 77.0
    change(state)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    after = opt.state_dict()
    assert same_bits(after["state"].pop("masters"), before["state"].pop("masters"))
    assert after == before
    assert same_bits(live_weights(opt), cast_masters(opt))


def test_lr_and_eps_of_a_schedule_are_loaded() -> None:
    opt, _ = make_step(make_mlp())
    opt.param_groups[0].update(lr=0.01, eps=5e-4)
    other, _ = make_step(make_mlp())
    other.load_state_dict(opt.state_dict())
    assert (other.param_groups[0]["lr"], other.param_groups[0]["eps"]) == (0.01, 5e-4)


@pytest.mark.parametrize(
    "setting", [{"weight_decay": 0.1}, {"momentum": 0.9}, {"betas": (0.9, 0.999)}, {"maximize": True}]
)
def test_settings_of_other_optimizers_are_rejected(setting: dict[str, Any]) -> None:
    model = make_mlp()
    groups = [{"params": list(model.parameters()), **setting}]
    with pytest.raises(ValueError, match=f"group 0 has {next(iter(setting))}=.*, which zeroth-order steps do not have"):
        make_step(model, params=groups)
    make_step(model, params=[{"params": list(model.parameters()), "weight_decay": 0.0, "name": "all"}])


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf")])
def test_a_learning_rate_that_was_set_out_of_range_is_rejected_by_the_next_step(lr: float) -> None:
    opt, closure = make_step(make_mlp())
    opt.param_groups[0]["lr"] = lr
    for use in (lambda: opt.step(closure), lambda: opt.apply(3, 0.5)):
        with pytest.raises(ValueError, match="lr must be finite and not negative"):
            use()
    assert opt.steps == 0


def test_frozen_parameters_are_trained_only_if_told() -> None:
    model = make_mlp()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0.weight' has masked elements and is frozen.*frozen=True"):
        make_step(model)
    opt, closure = make_step(model, frozen=True)
    opt.step(closure)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_gives_the_same_bits() -> None:
    models = make_mlp(), make_mlp()
    (opt, closure), (wanted, wanted_closure) = (make_step(model, backend="auto") for model in models)
    torch.compile(opt.step, backend="eager")(closure)
    torch.compile(opt.step_many, backend="eager")([closure] * 2)
    wanted.step_many([wanted_closure] * 3)
    assert same_bits(*map(flat_weights, models))


@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoints_are_told_to_save_the_state_dict() -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = make_mlp()
    opt, _ = make_step(model)
    with pytest.raises(TypeError, match=r"get_state_dict, cannot be used: save state_dict\(\)"):
        get_state_dict(model, opt)


def test_an_optimizer_is_freed_with_its_last_reference() -> None:
    """It holds the masters, perhaps in GPU memory, so they must not wait for the garbage collector."""
    model = make_mlp()
    opt, closure = make_step(model)
    opt.step(closure)
    gc.disable()
    try:
        alive = weakref.ref(opt), weakref.ref(opt.weights)
        del opt
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


def test_a_step_without_a_closure_says_what_to_do() -> None:
    opt, closure = make_step(make_mlp())
    with pytest.raises(TypeError, match=r"a step needs a closure .*get_state_dict.*save state_dict\(\)"):
        opt.step(None)
    opt.step(closure)


@pytest.mark.parametrize("use", ["step", "apply", "perturb", "restore", "reload", "state_dict", "log"])
def test_the_optimizer_cannot_be_used_within_its_own_step(use: str) -> None:
    model = make_mlp()
    opt, closure = make_step(model)
    uses: dict[str, Callable[[], object]] = {
        "step": lambda: opt.step(closure),
        "apply": lambda: opt.apply(3, 0.5),
        "perturb": lambda: opt.perturb(3, 1e-3),
        "restore": opt.restore,
        "reload": opt.reload,
        "state_dict": opt.state_dict,
        "log": lambda: opt.log,
    }

    def meddling() -> torch.Tensor:
        uses[use]()
        return closure()

    with pytest.raises(RuntimeError, match=f"{use} was called within a step"):
        opt.step(meddling)
    opt.step(closure)
    assert opt.steps == 1


def test_the_log_has_the_learning_rate_of_each_group() -> None:
    model, base = make_mlp(), make_mlp()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    opt, closure = make_step(model, queries=2, params=[{"params": first}, {"params": second, "lr": 0.01}])
    opt.step_many([closure] * 2)
    opt.param_groups[1]["lr"] = 0.5
    opt.step(closure)
    log = opt.log
    assert [lr for _, lr, _ in log.updates] == [(0.05, 0.005)] * 4 + [(0.05, 0.25)] * 2
    replay(base, opt.weights.mask, log)
    assert same_bits(flat_weights(base), flat_weights(model))


def test_the_log_of_a_resumed_training_continues_the_one_before(tmp_path: Any) -> None:
    model, base = make_mlp(), make_mlp()
    opt, closure = make_step(model)
    opt.step_many([closure] * 2)
    opt.log.save(tmp_path / "updates.jsonl")
    state, weights = opt.state_dict(), model.state_dict()
    resumed_model = make_mlp(seed=3)
    resumed_model.load_state_dict(weights)
    resumed, resumed_closure = make_step(resumed_model)
    resumed.load_state_dict(state)
    resumed.step_many([resumed_closure] * 2)
    before = type(resumed.log).load(tmp_path / "updates.jsonl")
    replay(base, opt.weights.mask, before + resumed.log)
    assert same_bits(flat_weights(base), flat_weights(resumed_model))
    with pytest.raises(ValueError, match="recorded from masked weights"):
        replay(make_mlp(), opt.weights.mask, resumed.log)


def test_skipped_and_applied_updates_are_in_the_log() -> None:
    model, base = make_mlp(), make_mlp()
    opt, closure = make_step(model, nonfinite="skip")
    opt.step(closure)
    opt.step(lambda: float("nan"))
    opt.apply(9, 0.25)
    log = opt.log
    assert [g != g for _, _, g in log.updates] == [False, True, False]
    assert log.updates[2] == (9, 0.1, 0.25)
    replay(base, opt.weights.mask, log)
    assert same_bits(flat_weights(base), flat_weights(model))
    assert len(opt.projected_gradients) == 2


def test_masters_that_were_set_directly_end_the_log() -> None:
    opt, closure = make_step(make_mlp())
    opt.step(closure)
    opt.weights.set_masters_(opt.weights.masters() + 1)
    with pytest.raises(ModelChangedError, match="set or replayed other than through the optimizer") as caught:
        opt.log  # noqa: B018
    assert "reload()" in str(caught.value)
    assert len(opt.projected_gradients) == 1
    opt.reload()
    opt.step(closure)
    assert len(opt.log.updates) == 1


@pytest.mark.parametrize("watch", ["subclass", "wrapper", "hook"])
def test_step_many_calls_step_if_somebody_would_notice_that_it_does_not(watch: str) -> None:
    called = []

    class Watched(SparseZO):
        def step(self, *of):  # type: ignore[no-untyped-def, override]
            called.append(1)
            return super().step(*of)

    opt, closure = make_step(make_mlp())
    if watch == "subclass":
        opt = Watched(opt._model, opt.weights.mask, lr=0.1, backend="torch")
    if watch == "wrapper":
        step = opt.step
        opt.step = lambda *of: called.append(1) or step(*of)  # type: ignore[func-returns-value, method-assign]
    if watch == "hook":
        opt.register_step_post_hook(lambda *_: called.append(1))
    opt.step_many([closure] * 3)
    assert len(called) == opt.steps == 3
