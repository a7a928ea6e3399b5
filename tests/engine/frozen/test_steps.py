"""Training beside frozen weights has the bits of training in place: steps, logs, deltas, states and interrupts."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.engine.delta import Delta
from meerkat_engine.engine.errors import DeltaError, MaskError, ModelChangedError, ModelError
from meerkat_engine.engine.frozen.freeze import freeze
from meerkat_engine.engine.frozen.quantized import Int8Stored
from meerkat_engine.engine.frozen.stored import PlainStored
from meerkat_engine.engine.lm.text_loss import language_model_loss
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.engine.sgd import sgd_steps
from meerkat_engine.engine.updates import UpdateLog
from meerkat_engine.engine.weights import MaskedWeights

from helpers.constants import DTYPES
from helpers.frozen import IDS, build_family, corners_mask, frozen_copy
from helpers.interrupts import Interrupts
from helpers.regression import INPUTS, cast_masters, live_weights, make_mlp, make_step, squared_output
from helpers.tensors import same_bits

KINDS: dict[str, dict[str, Any]] = {
    "two-point": {},
    "queries": {"queries": 3},
    "forward difference": {"estimator": "forward-difference", "queries": 2},
    "debug": {"debug": True},
}


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: language_model_loss(model, IDS)


def train(model: nn.Module, **options: Any) -> tuple[SparseZO, Tensor]:
    """Takes a step, then three at once. Returns the optimizer, and the losses."""
    opt = SparseZO(model, corners_mask(model), **({"lr": 0.02, "eps": 1e-2, "seed": 3, "frozen": True} | options))
    losses = [opt.step(closure_of(model)), *opt.step_many([closure_of(model)] * 3)]
    return opt, torch.stack(losses)


def delta_of(model: nn.Module, opt: SparseZO, base: nn.Module) -> Delta:
    """The delta to a trained model from its base model."""
    start = MaskedWeights(base, opt.weights.mask).masters()
    return Delta.of(model, opt.weights, base=fingerprint(base), start=start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_bits_of_steps_in_place(kind: str, backend: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if backend == "numba":
        pytest.importorskip("numba", reason="needs the extra cpu")

    def bases() -> tuple[nn.Module, nn.Module]:
        plain = build_family("Llama tied", dtype)
        return plain, frozen_copy(plain)

    plain, frozen = bases()
    opt, losses = train(plain, backend=backend, **KINDS[kind])
    own, own_losses = train(frozen, backend=backend, **KINDS[kind])
    end = fingerprint(plain)
    assert fingerprint(frozen) == end
    assert same_bits(own_losses, losses)
    assert own.projected_gradients == opt.projected_gradients
    assert same_bits(own.weights.masters(), opt.weights.masters())
    assert own.weights.digest() == opt.weights.digest()
    assert own.log == opt.log
    assert own.unchanged_fraction() == opt.unchanged_fraction()
    own.log.save(tmp_path / "log")
    delta_of(frozen, own, bases()[1]).save(tmp_path / "delta")
    for base in bases():
        replay(base, opt.weights.mask, UpdateLog.load(tmp_path / "log"), backend)
        assert fingerprint(base) == end
    for base in bases():
        Delta.load(tmp_path / "delta").apply(base, backend)
        assert fingerprint(base) == end


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_has_the_bits_of_steps_in_place(dtype: torch.dtype) -> None:
    """On a small model, for the interpreter."""
    found = []
    for model in (make_mlp(dtype), frozen_copy(make_mlp(dtype))):
        opt, closure = make_step(model, backend="triton", queries=2, frozen=True)
        losses = opt.step_many([closure] * 2)
        base = frozen_copy(make_mlp(dtype))
        replay(base, opt.weights.mask, opt.log, "triton")
        found.append((torch.stack(losses).tolist(), opt.log, fingerprint(model), fingerprint(base)))
    assert found[0] == found[1]
    assert found[0][2] == found[0][3]


def quantized(model: nn.Module) -> nn.Module:
    freeze(model, lambda name, p: Int8Stored.quantize(p) if "mlp" in name else PlainStored(p))
    return model


def test_a_delta_belongs_to_one_way_of_keeping_the_weights() -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra quantize")
    trained = quantized(build_family("Llama"))
    delta = delta_of(trained, train(trained)[0], quantized(build_family("Llama")))
    delta.apply(twin := quantized(build_family("Llama")))
    assert fingerprint(twin) == fingerprint(trained)
    dense = build_family("Llama")
    dense.load_state_dict(quantized(build_family("Llama")).state_dict())
    delta.apply(dense)
    assert fingerprint(dense) == fingerprint(trained)
    for other in (build_family("Llama"), frozen_copy(build_family("Llama"))):
        before = fingerprint(other)
        with pytest.raises(DeltaError, match=r"needs a base model of .*\(other floating-point parameters\)$"):
            delta.apply(other)
        assert fingerprint(other) == before


def test_parameter_groups_and_gradient_descent_are_those_of_the_plain_model() -> None:
    found = []
    for model in (build_family("GPT2"), frozen_copy(build_family("GPT2"))):
        parameters = list(model.parameters())
        groups = [{"params": parameters[:5]}, {"params": parameters[5:], "lr": 0.5}]
        opt = SparseZO(model, corners_mask(model), lr=0.02, params=groups, frozen=True)
        opt.step(closure_of(model))
        log = opt.log
        weights = MaskedWeights(model, corners_mask(model))
        losses = sgd_steps(model, weights, [closure_of(model)] * 2, [0.1, 0.2])
        found.append((log, torch.stack(losses).tolist(), fingerprint(model)))
    assert found[0] == found[1]


def test_queries_without_a_finite_loss_are_skipped_as_in_place() -> None:
    found = []
    for model in (make_mlp(), frozen_copy(make_mlp())):
        opt, closure = make_step(model, queries=3, nonfinite="skip", frozen=True)
        count = iter(range(100))
        opt.step_many([lambda closure=closure, count=count: closure() / (next(count) != 3)] * 2)  # type: ignore[misc]
        found.append((fingerprint(model), str(opt.projected_gradients)))
    assert found[0] == found[1]
    assert found[0][1].count("nan") == 1


def test_a_state_continues_beside_other_frozen_weights() -> None:
    model = frozen_copy(build_family("Llama"))
    opt = train(model)[0]
    state, saved = opt.state_dict(), fingerprint(model)
    opt.step(closure_of(model))
    other = frozen_copy(build_family("Llama"))
    resumed = SparseZO(other, corners_mask(other), lr=9.0, eps=1e-2, frozen=True)
    resumed.load_state_dict(state)
    assert fingerprint(other) == saved
    resumed.step(closure_of(other))
    assert fingerprint(other) == fingerprint(model)


def test_values_that_something_else_has_written_are_noticed() -> None:
    model: Any = frozen_copy(build_family("Llama"))
    opt = train(model)[0]
    wanted, weight = fingerprint(model), model.lm_head.weight
    weight.values[3] += 1
    with pytest.raises(ModelChangedError, match=r"written 1 of the .*, the first in 'lm_head\.weight'"):
        opt.step(closure_of(model))
    opt.restore()
    assert fingerprint(model) == wanted
    weight.values[3] += 1
    opt.reload()
    opt.step(closure_of(model))
    assert fingerprint(model) != wanted


def test_live_values_belong_to_the_latest_optimizer() -> None:
    model = frozen_copy(build_family("Llama"))
    first = train(model)[0]
    kept = fingerprint(model)
    second = SparseZO(model, corners_mask(model), lr=0.1, frozen=True)
    assert fingerprint(model) == kept
    second.step(closure_of(model))
    wanted = fingerprint(model)
    for use in (lambda: first.step(closure_of(model)), first.restore, lambda: first.perturb(1, 0.1), first.state_dict):
        with pytest.raises(ModelChangedError, match=r"belong to another optimizer; call this optimizer's `reload"):
            use()
        assert fingerprint(model) == wanted
    first.reload()
    assert same_bits(first.weights.masters(), second.weights.masters())
    first.step(closure_of(model))


def test_another_mask_takes_over_unless_it_would_lose_changed_values() -> None:
    model = frozen_copy(build_family("Llama"))
    first = train(model)[0]
    kept, mask = fingerprint(model), corners_mask(model)
    fewer = SparseMask(ids=mask.ids[:-1], table=mask.table, density=0.01, source="fewer")
    with pytest.raises(ModelError, match="another mask were changed beside this read-only weight, and would be lost"):
        SparseZO(model, fewer, lr=0.1, frozen=True)
    first.step(closure_of(model))  # still has its values
    kept = fingerprint(model)
    more = SparseMask(ids=torch.cat([mask.ids[:1], torch.tensor([5]), mask.ids[1:]]).unique(), table=mask.table,
                      density=0.01, source="more")  # fmt: skip
    SparseZO(model, more, lr=0.1, frozen=True)
    assert fingerprint(model) == kept
    part = SparseMask(ids=mask.ids[: len(mask) // 2], table=mask.table, density=0.01, source="of other parameters")
    fresh = frozen_copy(build_family("Llama"))
    SparseZO(fresh, mask, lr=0.1, frozen=True)
    SparseZO(fresh, part, lr=0.1, frozen=True)
    assert fingerprint(fresh) == fingerprint(build_family("Llama"))


MASKS: dict[str, Callable[[nn.Module], SparseMask]] = {
    "gradients": lambda model: SparseMask.from_gradients(model, [IDS, IDS[:2, :5]], 0.05, frozen=True),
    "of given elements": lambda model: corners_mask(model).with_gradient(model, [IDS, IDS[:2, :5]]),
    "magnitude": lambda model: SparseMask.magnitude(model, 0.05, frozen=True),
    "random": lambda model: SparseMask.random(model, 0.05, 1, frozen=True),
    "dense": lambda model: SparseMask.dense(model, frozen=True),
    "parameters": lambda model: SparseMask.of_parameters(model, [name for name, _ in model.named_parameters()][2:4]),
    "autocast": lambda model: SparseMask.from_gradients(model, [IDS], 0.05, frozen=True, loss=in_bfloat16),
}


def in_bfloat16(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return language_model_loss(model, batch)


@pytest.mark.parametrize("family", ["Llama tied", "Qwen2 tied", "GPT2", "OPT", "Mixtral"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_those_of_the_plain_model(name: str, family: str) -> None:
    plain = build_family(family)
    frozen = frozen_copy(plain)
    a, b = MASKS[name](plain), MASKS[name](frozen)
    assert b.digest == a.digest
    for mine, wanted in ((b.gradient, a.gradient), (b.scores, a.scores)):
        assert (mine is None) == (wanted is None)
        assert mine is None or wanted is None or same_bits(mine, wanted)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert fingerprint(frozen) == fingerprint(plain)


def test_read_only_weights_are_masked_only_when_asked() -> None:
    with pytest.raises(MaskError, match="read-only, with masked ones beside them; pass frozen=True"):
        SparseMask.random(frozen_copy(make_mlp()), 0.1, 1)


def test_calibration_holds_one_dense_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: Any = build_family("Llama", torch.bfloat16, num_hidden_layers=6)
    freeze(frozen, dtype=torch.float32)
    held: list[Any] = []
    most, dense = 0, PlainStored.dense

    def watched(self: PlainStored, dtype: torch.dtype, device: torch.device) -> Tensor:
        nonlocal most
        made = dense(self, dtype, device)
        held[:] = [reference for reference in held if reference.upgrade() is not None]
        held.append(_Storage(made))
        most = max(most, sum(reference.matrix for reference in held))
        return made

    monkeypatch.setattr(PlainStored, "dense", watched)
    monkeypatch.setattr(PlainStored, "read", watched)
    SparseMask.from_gradients(frozen, [IDS], 0.05, frozen=True)
    SparseMask.of_parameters(frozen, ["model.embed_tokens.weight"]).with_gradient(frozen, [IDS])
    assert 0 < most <= 2


class _Storage:
    """A weak reference to the memory of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.matrix, self._storage = tensor.dim() == 2, tensor.untyped_storage()
        self._weak = self._storage._weak_ref()
        del self._storage

    def upgrade(self) -> object:
        return None if torch.UntypedStorage._expired(self._weak) else self  # type: ignore[attr-defined]


def test_an_interrupt_at_any_place_loses_and_doubles_nothing() -> None:
    def start() -> tuple[nn.Module, SparseZO, Callable[[], Tensor]]:
        model = frozen_copy(make_mlp(torch.bfloat16))
        return model, *make_step(model, frozen=True)

    model, opt, closure = start()
    with Interrupts().active() as interrupts:
        opt.step_many([closure] * 3)
    final = fingerprint(model)
    for place in random.Random(0).sample(range(interrupts.seen), 60):
        model, opt, closure = start()
        with pytest.raises(KeyboardInterrupt), Interrupts(place).active():
            opt.step_many([closure] * 3)
        assert same_bits(live_weights(opt), cast_masters(opt))
        replay(base := make_mlp(torch.bfloat16), opt.weights.mask, opt.log, "torch")
        assert fingerprint(base) == fingerprint(model)
        opt.step_many([closure] * (3 - opt.steps))
        assert fingerprint(model) == final


def test_an_interrupted_calibration_leaves_the_model_as_it_was() -> None:
    def calibrate(model: nn.Module) -> SparseMask:
        return SparseMask.from_gradients(model, [INPUTS], 0.1, frozen=True, loss=lambda m, _: squared_output(m)())

    model: Any = frozen_copy(make_mlp())
    wanted = calibrate(model).digest  # imports what is needed
    with Interrupts().active() as interrupts:
        calibrate(model)
    for place in random.Random(0).sample(range(interrupts.seen), 60):
        with pytest.raises(KeyboardInterrupt), Interrupts(place).active():
            calibrate(model)
        assert not model(INPUTS).requires_grad
    assert calibrate(model).digest == wanted
