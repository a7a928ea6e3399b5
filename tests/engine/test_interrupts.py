"""An interrupt at any place: an update happens once or not at all, and weights, masters and log agree afterwards."""

import random
import signal
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType

import pytest
import torch
from torch import nn

from meerkat_engine import replay
from meerkat_engine.engine.captured import BoundLoss
from meerkat_engine.engine.weights import MaskedWeights
from meerkat_engine.triton_kernels import reference

from helpers.graphs import ImitatedGraphs
from helpers.imports import ROOT
from helpers.interrupts import Interrupts
from helpers.regression import cast_masters, live_weights, make_mlp, make_step
from helpers.tensors import flat_weights, same_bits

STEPS = 3
KINDS = {
    "two-point": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "forward-difference": (torch.float32, {"estimator": "forward-difference", "queries": 2}),
    "normalized-difference": (torch.float32, {"estimator": "normalized-difference", "queries": 2}),
    "program": (torch.float32, {"queries": 2}),
    "captured": (torch.bfloat16, {}),
    "captured forward-difference": (torch.float32, {"estimator": "forward-difference", "queries": 2}),
}


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def start(kind: str) -> tuple[nn.Module, object, Callable[[], torch.Tensor]]:
    dtype, options = KINDS[kind]
    model = make_mlp(dtype)
    opt, closure = make_step(model, **options)
    if kind.startswith("captured"):
        ImitatedGraphs(opt)
    return model, opt, BoundLoss(closure) if kind.startswith(("program", "captured")) else closure


def check_after_interrupt(kind: str, model: nn.Module, opt, closure, final: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """Weights are the masters', the log replays to them, and the remaining steps lead where they should."""
    assert same_bits(live_weights(opt), cast_masters(opt))
    log, steps = opt.log, opt.steps
    assert len(log.updates) == steps * opt.queries
    base = make_mlp(KINDS[kind][0])
    replay(base, opt.weights.mask, log, "torch")
    assert same_bits(flat_weights(base), flat_weights(model))
    opt.step_many([closure] * (STEPS - steps))
    assert same_bits(flat_weights(model), final)
    assert len(opt.projected_gradients) == STEPS * opt.queries


def uninterrupted(kind: str) -> tuple[torch.Tensor, int]:
    """The weights after all steps, and the number of places at which an interrupt can arrive."""
    model, opt, closure = start(kind)
    with Interrupts().active() as interrupts:
        opt.step_many([closure] * STEPS)
    return flat_weights(model), interrupts.seen


def test_an_interrupt_at_any_place_loses_and_doubles_nothing(kind: str) -> None:
    final, places = uninterrupted(kind)
    assert places > 1500
    for place in random.Random(kind).sample(range(places), 60):
        model, opt, closure = start(kind)
        interrupts = Interrupts(place)
        with pytest.raises(KeyboardInterrupt), interrupts.active():
            opt.step_many([closure] * STEPS)
        check_after_interrupt(kind, model, opt, closure, final)


def test_two_interrupts_in_a_row_are_repaired_by_the_next_call(kind: str) -> None:
    """The second one hits the repair of the first. Then nothing is lost either, but only the next call restores."""
    final, places = uninterrupted(kind)
    for place in random.Random(kind).sample(range(places), 25):
        model, opt, closure = start(kind)
        with pytest.raises(KeyboardInterrupt), Interrupts(place, place + 1 + place % 90).active():
            opt.step_many([closure] * STEPS)
        opt.step_many([])
        check_after_interrupt(kind, model, opt, closure, final)


@pytest.mark.parametrize("at", range(5))
def test_an_error_while_weights_are_written_is_repaired(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Not only signals: also an error of the operation itself, such as a lack of memory."""
    final, _ = uninterrupted("two-point")
    model, opt, closure = start("two-point")
    write, calls = reference._write_weights, iter(range(1000))

    def failing(*args: object) -> None:
        if next(calls) == at:
            raise MemoryError
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "_write_weights", failing)
    with pytest.raises(MemoryError):
        opt.step_many([closure] * STEPS)
    check_after_interrupt("two-point", model, opt, closure, final)


@pytest.mark.parametrize("window", [64, 1 << 22])
def test_replay_and_loaded_masters_are_applied_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Also where a table has several windows, which are updated one after the other."""
    monkeypatch.setattr(reference, "_WINDOW", window)
    updates = ([5, 6, 7], [0.1, -0.2, 0.3])
    ends, places = [], []
    other = start("bfloat16")[1].weights
    other.set_masters_(other.masters() + 1)
    operations: dict[str, Callable[[MaskedWeights], None]] = {
        "replay_": lambda weights: weights.replay_(*updates),
        "set_masters_": lambda weights: weights.set_masters_(other.masters()),
        "put_back_": lambda weights: weights.put_back_(other.saved()),
    }
    for operation, run in operations.items():
        _, opt, _ = start("bfloat16")
        before = opt.weights.masters()
        with Interrupts().active() as interrupts:
            run(opt.weights)
        ends.append((operation, before, opt.weights.masters()))
        places.append(interrupts.seen)
    for (operation, before, after), count in zip(ends, places, strict=True):
        for place in random.Random(operation).sample(range(count), 40):
            _, opt, _ = start("bfloat16")
            with pytest.raises(KeyboardInterrupt), Interrupts(place).active():
                operations[operation](opt.weights)
            masters = opt.weights.masters()
            assert same_bits(masters, before) or same_bits(masters, after)
            assert same_bits(live_weights(opt), cast_masters(opt))


def test_real_signals_do_not_tear_a_step() -> None:
    final, _ = uninterrupted("two-point")
    previous = signal.getsignal(signal.SIGALRM)
    interrupted = 0

    def interrupt(_: int, frame: FrameType | None) -> None:
        if frame is None or not frame.f_code.co_filename.startswith(str(ROOT / "engine")):
            # Somewhere else, such as in a finalizer, where Python drops exceptions: try again a little later.
            signal.setitimer(signal.ITIMER_REAL, 1e-5)
            return
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    try:
        for attempt in range(100):
            model, opt, closure = start("two-point")
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + attempt * 5e-5)
                opt.step_many([closure] * STEPS)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            check_after_interrupt("two-point", model, opt, closure, final)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 10


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", ["update_", "update_perturb_", "replay_"])
def test_an_interrupt_around_a_launch_neither_loses_nor_doubles_it(
    monkeypatch: pytest.MonkeyPatch, backend: str, group: int, when: str, operation: str
) -> None:
    """Also with several launch groups, of which some have the update and some do not."""
    ends = []
    for interrupt in (False, True):
        model = make_mlp()
        model[2].bfloat16()
        opt, _ = make_step(model, backend=backend)
        launch_groups = opt.weights._launch_groups
        assert len(launch_groups) == 2
        launch, calls = getattr(launch_groups[group].backend, operation), []

        def interrupted(*args: object, _launch=launch, _calls=calls, **kwargs: object) -> None:  # type: ignore[no-untyped-def]
            _calls.append(1)
            if len(_calls) == 1 and when == "before":
                raise KeyboardInterrupt
            _launch(*args, **kwargs)
            if len(_calls) == 1:
                raise KeyboardInterrupt

        if interrupt:
            monkeypatch.setattr(launch_groups[group].backend, operation, interrupted)
        seed, c, scale = (opt.weights.values.seed(3), opt._fp32(0.5), opt._fp32(0.25))
        with pytest.raises(KeyboardInterrupt) if interrupt else nullcontext():
            if operation == "update_":
                opt.weights.update_(seed, c)
            elif operation == "update_perturb_":
                opt.weights.update_perturb_(seed, c, seed, scale)
            else:
                opt.weights.replay_([3, 4], [0.5, -0.25])
        ends.append((opt.weights.masters(), *(p.detach().clone() for p in model.parameters()), opt.weights.updates))
    assert ends[0][-1] == ends[1][-1]
    assert all(same_bits(a, b) for a, b in zip(ends[0][:-1], ends[1][:-1], strict=True))
