"""SGD on the masked elements, compared with plain autograd and torch.optim.SGD."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask
from meerkat_engine.bench.measure import peak_bytes
from meerkat_engine.engine.errors import MaskError, ModelChangedError, NonFiniteLossError
from meerkat_engine.engine.lm.text_loss import language_model_loss
from meerkat_engine.engine.sgd import sgd_steps
from meerkat_engine.engine.weights import MaskedWeights

from helpers.constants import DTYPES
from helpers.losses import BATCH
from helpers.models import make_model
from helpers.tensors import flat_weights, same_bits

RATES = [0.5, 0.25, 0.125]


def closure_of(model: nn.Module) -> Callable[[], torch.Tensor]:
    return lambda: language_model_loss(model, BATCH)


def gradient_of(model: nn.Module, mask: SparseMask) -> tuple[torch.Tensor, torch.Tensor]:
    loss = language_model_loss(model, BATCH)
    loss.backward()
    gradient = torch.cat([p.grad.view(-1) for p in model.parameters()])[mask.ids].float()  # type: ignore[union-attr]
    model.zero_grad()
    return loss.detach(), gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_its_formula(architecture: str, dtype: torch.dtype) -> None:
    model, other = make_model(architecture, dtype), make_model(architecture, dtype)
    mask = SparseMask.random(model, 0.05, 1)
    before = flat_weights(model)
    weights, expected_weights = MaskedWeights(model, mask), MaskedWeights(other, mask)
    # sgd_steps starts from the masters, whatever the live weights are
    weights.perturb_(weights.values.seed(1), weights.values.numbers([0.5], torch.float32))
    losses = sgd_steps(model, weights, [closure_of(model)] * 3, RATES)
    for lr, loss in zip(RATES, losses, strict=True):
        wanted, gradient = gradient_of(other, mask)
        assert same_bits(loss, wanted)
        expected_weights.set_masters_(expected_weights.masters() - gradient * torch.tensor(lr))
    assert same_bits(weights.masters(), expected_weights.masters())
    assert same_bits(flat_weights(model), flat_weights(other))
    assert same_bits(flat_weights(model)[mask.ids], weights.masters().to(dtype))
    outside = torch.ones(before.numel(), dtype=torch.bool)
    outside[mask.ids] = False
    assert same_bits(flat_weights(model)[outside], before[outside])
    assert losses[-1] < losses[0]


def test_steps_equal_torch_sgd_on_a_masked_gradient(llama: nn.Module) -> None:
    other, mask = make_model(), SparseMask.random(llama, 0.05, 1)
    sgd_steps(llama, MaskedWeights(llama, mask), [closure_of(llama)] * 3, [0.5] * 3)
    ones = torch.zeros(flat_weights(other).numel())
    ones[mask.ids] = 1
    opt = torch.optim.SGD(other.parameters(), lr=0.5)
    for _ in range(3):
        opt.zero_grad()
        language_model_loss(other, BATCH).backward()
        for p, chosen in zip(other.parameters(), ones.split([p.numel() for p in other.parameters()]), strict=True):
            p.grad *= chosen.view(p.shape)  # type: ignore[operator]
        opt.step()
    # torch fuses product and difference, so after the first step its gradients are taken at weights one rounding apart
    torch.testing.assert_close(flat_weights(llama), flat_weights(other), rtol=1e-6, atol=1e-8)


def test_requires_grad_and_grad_are_restored(llama: nn.Module) -> None:
    parameters = dict(llama.requires_grad_(False).named_parameters())
    one, two = parameters["model.norm.weight"], parameters["model.layers.0.mlp.up_proj.weight"]
    for p in (one, two):
        p.requires_grad_(True)
        p.grad = torch.ones_like(p)
    mask = SparseMask.of_parameters(llama, ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"])
    seen = []

    def closure() -> torch.Tensor:
        seen.append([name for name, p in parameters.items() if p.requires_grad])
        return language_model_loss(llama, BATCH)

    for context in (torch.no_grad, torch.inference_mode):  # an outer context must not turn the gradients off
        with context():
            sgd_steps(llama, MaskedWeights(llama, mask), [closure], [0.1])
    assert seen == [["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]] * 2
    assert [name for name, p in parameters.items() if p.requires_grad] == [
        "model.layers.0.mlp.up_proj.weight", "model.norm.weight",
    ]  # fmt: skip
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in (one, two))
    assert all(p.grad is None for p in parameters.values() if p is not one and p is not two)


@pytest.mark.parametrize("failure", ["loss", "gradient", "error"])
def test_a_step_that_fails_is_not_applied(llama: nn.Module, failure: str) -> None:
    other, mask = make_model(), SparseMask.random(llama, 0.05, 1)
    sgd_steps(other, MaskedWeights(other, mask), [closure_of(other)], [0.1])

    def broken() -> torch.Tensor:
        loss = language_model_loss(llama, BATCH)
        if failure == "error":
            raise KeyError("x")
        return loss * float("nan") if failure == "loss" else (loss - loss.detach()).sqrt()  # its slope at 0 is infinite

    messages = {"loss": "the loss of step 1 is nan", "gradient": "the gradient of step 1 is not finite", "error": "x"}
    weights = MaskedWeights(llama, mask)
    with pytest.raises(KeyError if failure == "error" else NonFiniteLossError, match=messages[failure]):
        sgd_steps(llama, weights, [closure_of(llama), broken], [0.1, 0.1])
    assert same_bits(flat_weights(llama), flat_weights(other))
    assert same_bits(weights.masters(), flat_weights(other)[mask.ids])
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())


def test_invalid_arguments_are_rejected(llama: nn.Module) -> None:
    weights = MaskedWeights(llama, SparseMask.random(llama, 0.05, 1))
    for lr in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a learning rate must be finite and not negative"):
            sgd_steps(llama, weights, [closure_of(llama)], [lr])
    with pytest.raises(ValueError, match="1 learning rates were given, but there are more steps"):
        sgd_steps(llama, weights, [closure_of(llama)] * 2, [0.1])
    for value in (0.5, torch.zeros(()), torch.zeros(3, requires_grad=True)):
        with pytest.raises(ValueError, match="the closure of step 0 must return one loss"):
            sgd_steps(llama, weights, [lambda value=value: value], [0.1])  # type: ignore[misc]
    with pytest.raises(MaskError, match="another model"):
        sgd_steps(make_model("opt"), weights, [], [])
    llama.to(torch.bfloat16)
    with pytest.raises(ModelChangedError, match="moved or cast"):
        sgd_steps(llama, weights, [closure_of(llama)], [0.1])


def test_steps_hold_at_most_two_gradients() -> None:
    model, x = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(8)]), torch.ones(1, 512)
    weights = MaskedWeights(model, SparseMask.random(model, 1e-3, 0))
    weight = 512 * 512 * 4
    peak = peak_bytes(lambda: sgd_steps(model, weights, [lambda: model(x).sum()], [0.1]), torch.device("cpu"))
    assert weight <= peak < 3.5 * weight


def test_parameters_that_a_loss_does_not_use_stay_unchanged(llama: nn.Module) -> None:
    """The gradient of the step before is not applied again."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    weights, x = MaskedWeights(model, SparseMask.dense(model)), torch.ones(1, 4)
    seen = []

    def second() -> torch.Tensor:
        seen.append(model["b"].weight.clone())
        return model["a"](x).sum()  # type: ignore[no-any-return]

    sgd_steps(model, weights, [lambda: model["b"](model["a"](x)).sum(), second], [0.1, 0.1])
    assert same_bits(model["b"].weight.detach(), seen[0].detach())
