"""What a closure may return, and warnings about losses that cannot serve as the basis of a step."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from meerkat_engine import SparseMask, SparseZO

from helpers.regression import INPUTS, cast_masters, live_weights, make_mlp, make_step
from helpers.tensors import same_bits


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda loss: None, TypeError, "returned None; end it with `return loss`"),
        (lambda loss: {"loss": loss}, TypeError, "the loss alone, a scalar, got dict"),
        (lambda loss: SequenceClassifierOutput(loss=loss), TypeError, "got SequenceClassifierOutput.*`output.loss`"),
        (lambda loss: (loss, 1), TypeError, "got tuple"),
        (lambda loss: "0.5", TypeError, "got str"),
        (lambda loss: loss.expand(4), ValueError, r"a tensor of shape \[4\]; take its mean"),
        (lambda loss: loss.expand(0), ValueError, r"a tensor of shape \[0\]"),
        (lambda loss: loss > 0, ValueError, "one real loss, got torch.bool"),
        (lambda loss: loss.to(torch.complex64), ValueError, "one real loss, got torch.complex64"),
    ],
)  # fmt: skip
def test_a_closure_must_return_one_number(
    returned: Callable[[torch.Tensor], Any], error: type[Exception], message: str
) -> None:
    opt, closure = make_step(make_mlp())
    with pytest.raises(error, match=message):
        opt.step(lambda: returned(closure()))
    assert same_bits(live_weights(opt), cast_masters(opt))
    assert opt.steps == 0


@pytest.mark.parametrize(
    "returned", [float, lambda loss: loss.numpy()[()], lambda loss: loss.double(), lambda loss: loss[None]]
)
def test_numbers_of_all_kinds_are_losses(returned: Callable[[torch.Tensor], Any]) -> None:
    (opt, closure), (wanted, _) = make_step(make_mlp()), make_step(make_mlp())
    opt.step(lambda: returned(closure()))
    wanted_model = make_mlp()
    wanted, wanted_closure = make_step(wanted_model)
    wanted.step(wanted_closure)
    assert opt.projected_gradients == wanted.projected_gradients


def test_backward_in_a_closure_is_explained() -> None:
    opt, closure = make_step(make_mlp())

    def with_backward() -> torch.Tensor:
        loss = closure()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError) as caught:
        opt.step(with_backward)
    assert "inference mode: it returns the loss, without backward()" in caught.value.__notes__[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_loss_in_low_precision_is_warned_of_once(dtype: torch.dtype) -> None:
    opt, closure = make_step(make_mlp())
    message = rf"the loss is {dtype}: .*compute the loss in float32, from `logits.float\(\)`"
    with pytest.warns(UserWarning, match=message) as caught:
        opt.step(lambda: closure().to(dtype))
    assert caught[0].filename == __file__  # it points at the user's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: closure().to(dtype))
        make_step(make_mlp(dtype))[0].step(closure)


@pytest.mark.filterwarnings("ignore")
def test_a_low_precision_loss_really_is_too_coarse() -> None:
    """The reason for the warning: from a bfloat16 loss most projected gradients are 0 or far off."""
    model = make_mlp()
    opt, closure = make_step(model, lr=0.0)
    opt.step_many([lambda: 1 + closure()] * 20)
    coarse, _ = make_step(model, lr=0.0)
    coarse.step_many([lambda: (1 + closure()).bfloat16()] * 20)
    assert sum(g == 0 for g in opt.projected_gradients) == 0
    assert sum(g == 0 for g in coarse.projected_gradients) > 10


def disconnected(model: nn.Module) -> Callable[[], torch.Tensor]:
    copy = make_mlp()
    return lambda: copy(INPUTS).square().mean()


def prepared(model: nn.Module) -> Callable[[], torch.Tensor]:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return lambda: torch.func.functional_call(model, weights, INPUTS).square().mean()


def without_masked_elements(model: nn.Module) -> Callable[[], torch.Tensor]:
    return lambda: INPUTS.mean()


@pytest.mark.parametrize("build", [disconnected, prepared, without_masked_elements])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_perturbation_that_never_reaches_the_loss_is_warned_of(build: Callable[..., Any], nonfinite: str) -> None:
    model = make_mlp()
    opt, _ = make_step(model, nonfinite=nonfinite)
    closure = build(model)
    opt.step_many([closure] * 7)
    assert opt.projected_gradients == [0.0] * 7
    message = "the last 8 queries had equal losses at both points.*does not reach the loss"
    with pytest.warns(UserWarning, match=message):  # when the step is taken, or when its scalar is read
        assert [opt.step(closure).isfinite().all(), len(opt.projected_gradients)] == [True, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step_many([closure] * 20)


def test_an_eps_that_rounds_to_nothing_is_warned_of() -> None:
    opt, closure = make_step(make_mlp(torch.bfloat16), eps=1e-30)
    with pytest.warns(UserWarning, match="eps is too small for the weights' dtype"):
        opt.step_many([closure] * 8)


def test_single_equal_losses_are_no_reason_to_warn() -> None:
    opt, closure = make_step(make_mlp())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            opt.step_many([lambda: 1.0] * 7)
            opt.step(closure)


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (dropping, r"its module '1' \(Dropout\) drops other units in every call of the closure; call model.eval\(\)"),
        (normalized, r"its module '1' \(BatchNorm1d\) changes its running statistics"),
    ],
)
def test_training_mode_is_warned_of_once(build: Callable[[], nn.Module], message: str) -> None:
    model = build()
    opt = SparseZO(model, SparseMask.random(model, 0.5, 1), lr=0.1)
    closure = lambda: model(INPUTS).square().mean()  # noqa: E731
    with pytest.warns(UserWarning, match=message) as caught:
        opt.step_many([closure])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)
        model.eval()
        SparseZO(model, SparseMask.random(model, 0.5, 1), lr=0.1).step(closure)
        make_step(make_mlp().train())[0].step(closure)  # nothing in it differs in training mode


def test_weight_freezing_of_the_compiler_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as config

    monkeypatch.setattr(config, "freezing", True)
    opt, closure = make_step(make_mlp())
    with pytest.warns(UserWarning, match="freezing is on"):
        opt.step(closure)
