"""The masters are a copy of the weights: whatever else writes the weights is noticed, never overwritten silently."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.engine.errors import ModelChangedError

from helpers.regression import INPUTS, cast_masters, live_weights, make_mlp, make_step
from helpers.tensors import flat_weights, same_bits


def load_other_weights(model: nn.Module) -> None:
    model.load_state_dict(make_mlp(seed=5).state_dict())


def average(model: nn.Module) -> None:
    averaged = AveragedModel(model)
    averaged.update_parameters(make_mlp(seed=5))
    averaged.update_parameters(make_mlp(seed=6))
    model.load_state_dict(averaged.module.state_dict())


def initialize(model: nn.Module) -> None:
    nn.init.zeros_(model[0].weight)  # type: ignore[index]


def descend(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(INPUTS).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


WRITES = [load_other_weights, average, initialize, descend]


@pytest.fixture(params=WRITES, ids=lambda write: write.__name__)
def write(request: pytest.FixtureRequest) -> Callable[[nn.Module], None]:
    return request.param  # type: ignore[no-any-return]


USES: dict[str, Callable[[SparseZO, Callable[[], torch.Tensor]], object]] = {
    "step": lambda opt, closure: opt.step(closure),
    "step_many": lambda opt, closure: opt.step_many([closure] * 2),
    "apply": lambda opt, closure: opt.apply(3, 0.5),
    "perturb": lambda opt, closure: opt.perturb(3, 1e-3),
    "log": lambda opt, closure: opt.log,
    "state_dict": lambda opt, closure: opt.state_dict(),
    "replay_": lambda opt, closure: opt.weights.replay_([1], [0.5]),
}


@pytest.mark.parametrize("use", sorted(USES))
def test_weights_that_something_else_wrote_are_not_overwritten(write: Callable[[nn.Module], None], use: str) -> None:
    model = make_mlp()
    opt, closure = make_step(model)
    opt.step(closure)
    masters = opt.weights.masters()
    write(model)
    written = flat_weights(model).clone()
    with pytest.raises(
        ModelChangedError, match=r"something else has written \d+ of the 48 masked weights, the first in"
    ):
        USES[use](opt, closure)
    assert same_bits(flat_weights(model), written)
    assert same_bits(opt.weights.masters(), masters)
    assert opt.steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reload_continues_from_the_new_values(dtype: torch.dtype) -> None:
    model = make_mlp(dtype)
    opt, closure = make_step(model)
    opt.step_many([closure] * 2)
    model.load_state_dict(make_mlp(dtype, seed=5).state_dict())
    opt.reload()
    assert len(opt.log.updates) == 0
    opt.step_many([closure] * 2)
    base = make_mlp(dtype, seed=5)
    replay(base, opt.weights.mask, opt.log)
    assert same_bits(flat_weights(base), flat_weights(model))
    assert opt.steps == 4
    assert len(opt.projected_gradients) == 4


def test_restore_puts_the_old_values_back(write: Callable[[nn.Module], None]) -> None:
    model, other = make_mlp(), make_mlp()
    (opt, closure), (wanted, wanted_closure) = make_step(model), make_step(other)
    opt.step(closure)
    masked = live_weights(opt)
    write(model)
    opt.restore()
    assert same_bits(live_weights(opt), masked)
    wanted.step(wanted_closure)
    if write is load_other_weights:
        return  # the weights outside the mask are other ones, so other losses follow
    opt.weights.check_not_overwritten()


def test_two_optimizers_with_overlapping_masks_notice_each_other() -> None:
    model = make_mlp()
    (first, closure), (second, _) = make_step(model), make_step(model)
    first.step(closure)
    with pytest.raises(ModelChangedError, match="something else has written"):
        second.step(closure)
    second.reload()
    second.step(closure)
    with pytest.raises(ModelChangedError, match="something else has written"):
        first.step(closure)


def test_weights_outside_the_mask_may_be_written() -> None:
    model = make_mlp()
    mask = SparseMask.of_parameters(model, ["0.weight"])
    opt = SparseZO(model, mask, lr=0.1)
    with torch.no_grad():
        model[2].weight.add_(1)
    opt.step(lambda: model(INPUTS).square().mean())


@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_nan_weights_and_signed_zeros_are_no_change(backend: str) -> None:
    model = make_mlp(torch.bfloat16)
    with torch.no_grad():
        model[0].weight[0] = float("nan")
        model[0].weight[1] = -0.0
    opt = SparseZO(model, SparseMask.dense(model), lr=0.1, backend=backend)
    opt.restore()
    assert opt.weights.count_overwritten().tolist() == [0, 0]


@pytest.mark.parametrize("change", ["cast", "assign"])
def test_a_model_that_changes_within_a_step_is_left_restored(change: str) -> None:
    """The step raises; its closure may have replaced the weights, or cast them while they were perturbed."""
    model = make_mlp()
    opt, _ = make_step(model)
    before = live_weights(opt)
    other = {name: p.clone() for name, p in make_mlp(seed=5).state_dict().items()}
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            model.bfloat16() if change == "cast" else model.load_state_dict(other, assign=True)
        return model(INPUTS.to(model[0].weight.dtype)).float().mean()

    with pytest.raises(ModelChangedError, match="was moved or cast" if change == "cast" else "was replaced"):
        opt.step(closure)
    if change == "cast":
        assert same_bits(flat_weights(model), flat_weights(make_mlp().bfloat16()))
        opt.restore()
        assert same_bits(flat_weights(model), flat_weights(make_mlp().bfloat16()))
    else:
        assert same_bits(flat_weights(model), flat_weights(make_mlp(seed=5)))
        for use in ("step", "apply", "perturb", "state_dict"):
            with pytest.raises(ModelChangedError, match="was replaced"):
                USES[use](opt, closure)
        with pytest.raises(ModelChangedError, match="was replaced"):
            opt.restore()
    if change == "cast":  # the closure, and so the cast, ran in inference mode
        with pytest.raises(ValueError, match="inference mode"):
            opt.reload()
        model.float()
    opt.reload()
    opt.step(closure)
    assert opt.steps == 1
    assert not same_bits(live_weights(opt), before)


def test_a_moved_model_still_has_a_state(tmp_path: object) -> None:
    """Casting or moving a trained model before saving its state is no error: the masters are still right."""
    model = make_mlp()
    opt, closure = make_step(model)
    opt.step(closure)
    masters = opt.weights.masters()
    model.bfloat16()
    assert same_bits(opt.state_dict()["state"]["masters"], masters)


def test_debug_finds_a_closure_that_writes_the_weights() -> None:
    model = make_mlp()
    opt, closure = make_step(model, debug=True)
    reference, _ = make_step(make_mlp())
    opt.step_many([closure] * 2)

    def writing() -> torch.Tensor:
        with torch.no_grad():
            model[0].weight.clamp_(-0.01, 0.01)
        return closure()

    with pytest.raises(ModelChangedError, match="such as the closure, has written"):
        opt.step(writing)
    assert same_bits(live_weights(opt), cast_masters(opt))
    assert opt.steps == 2
    assert reference.steps == 0


def test_float16_weights_beyond_their_range_are_an_error() -> None:
    model = make_mlp(torch.float16)
    opt, _ = make_step(model)
    with pytest.raises(ModelChangedError, match=r"beyond the range of their dtype.*use a smaller learning rate"):
        opt.apply(3, 1e7)
    opt, _ = make_step(make_mlp(torch.bfloat16))
    opt.apply(3, 1e7)


def test_on_a_gpu_the_check_does_not_wait_and_the_scalars_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is imitated: values that would be read from it are counted until the scalars are read."""
    model = make_mlp()
    opt, closure = make_step(model)
    monkeypatch.setattr(opt, "_waits", False)
    monkeypatch.setattr(opt, "_check_immediately", False)
    opt.step(closure)
    load_other_weights(model)
    opt.step(closure)
    with pytest.raises(ModelChangedError, match="something else has written 48"):
        opt.projected_gradients  # noqa: B018
    assert len(opt.projected_gradients) == 2
    assert same_bits(live_weights(opt), cast_masters(opt))
