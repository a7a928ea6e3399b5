"""Any mix of steps, interrupts, loads, saves, casts, schedules, hooks and outside writes, against a plain-torch model.

``Twin`` is an independent implementation of what should be: it has the weights, masters and scalars, computes every
step by its formula, and knows nothing of the engine but the stream of normals.
"""

import contextlib
import copy
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from meerkat_engine import SparseMask, SparseZO, replay, stream
from meerkat_engine.engine.captured import BoundLoss
from meerkat_engine.engine.errors import ModelChangedError

from helpers.constants import FUZZ
from helpers.interrupts import Interrupts
from helpers.regression import make_mlp, squared_output
from helpers.tensors import flat_weights, same_bits

EPS = 1e-3
EXAMPLES = 30 * FUZZ


class Twin:
    """What an optimizer and its model should be.

    Args:
        model: a copy of the model.
        ids: its masked elements.
        queries: number of queries per step.
    """

    def __init__(self, model: nn.Module, ids: Tensor, queries: int) -> None:
        self.model, self.ids, self.queries = model, ids, queries
        self.lr, self.steps, self.seed = 0.1, 0, 0
        self.read_masters()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def read_masters(self) -> None:
        self.masters = flat_weights(self.model)[self.ids].float()
        self.base: nn.Module | None = copy.deepcopy(self.model)  # at which the log starts
        self.scalars = 0  # in the log

    def write(self, values: Tensor) -> None:
        weights = flat_weights(self.model)
        weights[self.ids] = values.to(self.dtype)
        for p, part in zip(
            self.model.parameters(), weights.split([p.numel() for p in self.model.parameters()]), strict=True
        ):
            p.data.copy_(part.view(p.shape))

    def step(self) -> list[float]:
        """Takes a step; returns its scalars."""
        gradients, updates = [], []
        for query in range(self.queries):
            z = stream.normal(stream.step_seed(self.seed, 0, self.steps, query), self.ids)
            losses = []
            for scale in (EPS, -EPS):
                self.write(self.masters + z * torch.tensor(scale))
                with torch.inference_mode():
                    losses.append(squared_output(self.model)().double())
            g = ((losses[0] - losses[1]) / (2 * EPS)).float()
            gradients.append(g.item())
            updates.append(z * torch.tensor(self.lr / self.queries * g.item()))
        for update in updates:
            self.masters = self.masters - update
        self.write(self.masters)
        self.steps += 1
        self.scalars += self.queries
        return gradients

    def apply(self, seed: int, g: float) -> None:
        c = torch.tensor(self.lr / self.queries * g)
        self.masters = self.masters - stream.normal(seed, self.ids) * c
        self.write(self.masters)
        self.scalars += 1


class Machine(RuleBasedStateMachine):
    """The optimizer and its twin do the same; after each rule they must be equal."""

    @initialize(dtype=st.sampled_from([torch.float32, torch.bfloat16]), queries=st.sampled_from([1, 2]))
    def start(self, dtype: torch.dtype, queries: int) -> None:
        self.model = make_mlp(dtype)
        mask = SparseMask.random(self.model, 0.3, seed=1)
        self.twin = Twin(make_mlp(dtype), mask.ids, queries)
        self.opt = SparseZO(self.model, mask, lr=0.1, eps=EPS, queries=queries, backend="torch")
        self.closure = squared_output(self.model)
        self.changed = self.moved = False  # what the optimizer must refuse to continue from
        self.saved: tuple[dict[str, Any], dict[str, Any], dict[str, Any], torch.dtype] | None = None
        self.scheduler: StepLR | None = None
        self.hook: Any = None
        self.gradients: list[float] = []
        self.seen: list[Tensor] = []

    def must_refuse(self) -> bool:
        return self.changed or self.moved

    @rule(count=st.integers(1, 3), together=st.booleans(), bound=st.booleans())
    def step(self, count: int, together: bool, bound: bool = False) -> None:
        closure = BoundLoss(self.closure) if bound else self.closure
        if self.must_refuse():
            with pytest.raises(ModelChangedError):
                self.opt.step(closure)
            return
        self.seen.clear()
        if together:
            self.opt.step_many([closure] * count)
        else:
            for _ in range(count):
                self.opt.step(closure)
        self.follow(count)

    def follow(self, count: int) -> None:
        """The twin takes the steps that the optimizer has taken."""
        wanted = []
        for _ in range(count):
            self.gradients += self.twin.step()
            wanted.append(flat_weights(self.twin.model))
        if self.hook is not None:  # an interrupt may come between a step and its hook
            assert len(wanted) - 1 <= len(self.seen) <= len(wanted)
            assert all(same_bits(a, b) for a, b in zip(self.seen, wanted, strict=False))

    @precondition(lambda self: not self.must_refuse())
    @rule(place=st.integers(0, 2500), second=st.integers(1, 200), bound=st.booleans())
    def interrupted_steps(self, place: int, second: int, bound: bool) -> None:
        before = self.opt.steps
        self.seen.clear()
        with contextlib.suppress(KeyboardInterrupt), Interrupts(place, place + second).active():
            self.opt.step_many([BoundLoss(self.closure) if bound else self.closure] * 3)
        self.opt.step_many([])  # after two interrupts the next call repairs
        assert before <= self.opt.steps <= before + 3
        self.follow(self.opt.steps - before)

    @precondition(lambda self: not self.must_refuse())
    @rule(error=st.sampled_from([ValueError, KeyboardInterrupt]), call=st.integers(0, 5), bound=st.booleans())
    def failing_closure(self, error: type[BaseException], call: int, bound: bool) -> None:
        calls = []

        def failing() -> Tensor:
            calls.append(1)
            if len(calls) > call:
                raise error
            return self.closure()

        before = self.opt.steps
        self.seen.clear()
        with pytest.raises(error):
            self.opt.step_many([BoundLoss(failing) if bound else failing] * 4)
        self.follow(self.opt.steps - before)

    @rule(seed=st.integers(0, 2**64 - 1), g=st.floats(-2, 2, width=32))
    def apply(self, seed: int, g: float) -> None:
        if self.must_refuse():
            with pytest.raises(ModelChangedError):
                self.opt.apply(seed, g)
        else:
            self.opt.apply(seed, g)
            self.twin.apply(seed, g)

    @precondition(lambda self: not self.must_refuse())
    @rule(seed=st.integers(0, 2**64 - 1))
    def perturb_and_restore(self, seed: int) -> None:
        self.opt.perturb(seed, EPS)
        self.twin.write(self.twin.masters + stream.normal(seed, self.twin.ids) * torch.tensor(EPS))
        assert same_bits(flat_weights(self.model), flat_weights(self.twin.model))
        self.opt.restore()
        self.twin.write(self.twin.masters)

    @precondition(lambda self: not self.must_refuse())
    @rule(seed=st.integers(0, 2**64 - 1))
    def perturb_and_step(self, seed: int) -> None:
        """A step restores what the caller has perturbed."""
        self.opt.perturb(seed, EPS)
        self.step(1, together=False)

    @rule(masked=st.booleans(), value=st.floats(-1, 1, width=16))
    def write_outside(self, masked: bool, value: float) -> None:
        """Another part of the program writes one weight."""
        element = int(self.twin.ids[3]) if masked else int((~torch.isin(torch.arange(161), self.twin.ids)).nonzero()[3])
        for model in (self.model, self.twin.model):
            parameter, at = locate(model, element)
            before = parameter.data.view(-1)[at].item()
            parameter.data.view(-1)[at] = value
        if masked and not self.moved:
            self.changed = self.changed or before != value
            wanted = self.twin.masters[3].to(self.twin.dtype).item()
            if value == wanted and before != value:
                self.changed = bool(
                    (flat_weights(self.twin.model)[self.twin.ids] != self.twin.masters.to(self.twin.dtype)).any()
                )

    @rule(seed=st.integers(1, 5))
    def load_weights(self, seed: int) -> None:
        for model in (self.model, self.twin.model):
            model.load_state_dict(make_mlp(seed=seed).state_dict())
        if not self.moved:
            masked = flat_weights(self.twin.model)[self.twin.ids]
            self.changed = not torch.equal(masked, self.twin.masters.to(self.twin.dtype))

    @rule()
    def reload(self) -> None:
        self.opt.reload()
        self.twin.read_masters()
        self.changed = self.moved = False

    @rule()
    def restore(self) -> None:
        self.opt.restore()
        self.twin.write(self.twin.masters)
        self.changed = False

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        if self.changed:
            self.restore()
        self.moved = self.moved or dtype != self.twin.dtype
        self.model.to(dtype)
        self.twin.model.to(dtype)

    @rule()
    def save(self) -> None:
        if self.changed and not self.moved:
            with pytest.raises(ModelChangedError):
                self.opt.state_dict()
        elif not self.must_refuse():
            twin = {"masters": self.twin.masters.clone(), "steps": self.twin.steps, "lr": self.twin.lr}
            self.saved = (
                copy.deepcopy(self.opt.state_dict()),
                copy.deepcopy(self.model.state_dict()),
                twin,
                self.twin.dtype,
            )

    @precondition(lambda self: self.saved is not None and not self.moved)
    @rule()
    def load(self) -> None:
        assert self.saved is not None
        state, weights, twin, dtype = self.saved
        if dtype != self.twin.dtype:
            return
        for model in (self.model, self.twin.model):
            model.load_state_dict(weights)
        self.opt.load_state_dict(copy.deepcopy(state))
        self.twin.masters, self.twin.steps, self.twin.lr = twin["masters"].clone(), twin["steps"], twin["lr"]
        self.twin.write(self.twin.masters)
        self.twin.scalars, self.twin.base = 0, None  # masters of a state are finer than any model's weights
        self.changed, self.scheduler = False, None

    @rule(lr=st.floats(0, 0.2))
    def set_lr(self, lr: float) -> None:
        self.opt.param_groups[0]["lr"] = self.twin.lr = lr

    @rule()
    def scheduler_step(self) -> None:
        if self.scheduler is None:
            if self.opt.steps == 0:
                return  # torch warns
            self.opt.param_groups[0].pop("initial_lr", None)
            self.scheduler = StepLR(self.opt, 1, gamma=0.9)
            self.scheduler._step_count = 1
        self.opt._opt_called = True  # type: ignore[attr-defined]
        self.scheduler.step()
        self.twin.lr = self.opt.param_groups[0]["lr"]

    @rule()
    def toggle_hook(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        else:
            self.hook = self.opt.register_step_post_hook(lambda *_: self.seen.append(flat_weights(self.model)))

    @rule()
    def clear_scalars(self) -> None:
        assert self.opt.projected_gradients == self.gradients
        self.opt.projected_gradients.clear()
        self.gradients.clear()

    @precondition(lambda self: not self.must_refuse())
    @rule()
    def replay_log(self) -> None:
        log = self.opt.log
        assert len(log.updates) == self.twin.scalars
        if self.twin.base is not None:
            base = copy.deepcopy(self.twin.base)
            replay(base, self.opt.weights.mask, log, "torch")
            assert same_bits(flat_weights(base)[self.twin.ids], flat_weights(self.model)[self.twin.ids])

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        assert same_bits(flat_weights(self.model), flat_weights(self.twin.model))
        assert same_bits(self.opt.weights.masters(), self.twin.masters)
        assert self.opt.steps == self.twin.steps
        assert self.opt.param_groups[0]["lr"] == self.twin.lr


def locate(model: nn.Module, element: int) -> tuple[nn.Parameter, int]:
    """Finds the parameter of an element, and the element's place in it."""
    for p in model.parameters():
        if element < p.numel():
            return p, element
        element -= p.numel()
    raise IndexError(element)


Machine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=20, deadline=None)
test_any_mix_of_operations_gives_what_the_formulas_say = Machine.TestCase
