"""Calibration leaves the model, its hooks and torch's state as they were, and works or says why not in odd settings."""

import contextlib
import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from meerkat_engine import SparseMask
from meerkat_engine.engine.errors import DataError, MaskError, ModelError
from meerkat_engine.engine.lm.text_loss import language_model_loss
from meerkat_engine.engine.sensitivity import select_largest

from helpers.interrupts import Interrupts
from helpers.losses import CALIBRATION_BATCHES
from helpers.models import make_model
from helpers.regression import make_mlp, squared_output
from helpers.tensors import same_bits


class Odd(nn.Module):
    """A model with a complex parameter, a buffer that its forward writes, and random numbers in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x + 0.1 * torch.rand_like(x)) * self.phase.abs()
        return self.second(x)  # type: ignore[no-any-return]


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()  # type: ignore[no-any-return]


X = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_calibration_leaves_everything_as_it_was(fails: bool) -> None:
    model = Odd().train()
    model.second.eval()
    model.first.bias.requires_grad_(False)
    model.first.weight.grad = torch.ones(4, 4)
    model.calls.fill_(5)
    torch.manual_seed(3)
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        assert not any(module.training for module in model.modules())
        value = squared(model, batch)
        return value * float("nan") if fails else value

    if fails:
        with pytest.raises(MaskError, match="the loss on calibration batch 0 is nan"):
            SparseMask.from_gradients(model, [X, X], 0.5, loss=loss)
    else:
        SparseMask.from_gradients(model, [X, X], 0.5, loss=loss)
    assert [m.training for m in (model, model.first, model.second)] == [True, True, False]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["first.bias"]
    assert torch.equal(model.first.weight.grad, torch.ones(4, 4))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["first.weight"]
    assert model.calls.tolist() == [5, 5]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_no_hook_on_a_parameter_runs_in_calibration(llama: nn.Module) -> None:
    """Not an optimizer in the backward pass, and no hook that changes gradients; afterwards all of them run again."""
    expected = SparseMask.from_gradients(make_model(), CALIBRATION_BATCHES, 0.01)
    ran: list[str] = []
    weight = llama.model.norm.weight  # type: ignore[union-attr]
    accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *_: ran.append("accumulator"))

    def step(parameter: Tensor) -> None:
        ran.append("step")
        parameter.data.sub_(parameter.grad)  # type: ignore[arg-type]

    def scale(gradient: Tensor) -> Tensor:
        ran.append("scale")
        return gradient * 100

    handles = [weight.register_post_accumulate_grad_hook(step), weight.register_hook(scale)]
    mask = SparseMask.from_gradients(llama, CALIBRATION_BATCHES, 0.01)
    assert ran == []
    assert same_bits(weight, make_model().model.norm.weight)  # type: ignore[union-attr]
    assert mask.gradient is not None
    assert expected.gradient is not None
    assert mask.digest == expected.digest
    assert same_bits(mask.gradient, expected.gradient)
    language_model_loss(llama, CALIBRATION_BATCHES[0]).backward()
    assert sorted(ran) == ["accumulator", "scale", "step"]
    for handle in handles:
        handle.remove()
    language_model_loss(llama, CALIBRATION_BATCHES[0]).backward()
    assert sorted(ran) == ["accumulator", "accumulator", "scale", "step"]


def test_calibration_works_in_inference_mode(llama: nn.Module) -> None:
    expected = SparseMask.from_gradients(llama, CALIBRATION_BATCHES, 0.01)
    with torch.inference_mode():
        batches = [
            {"input_ids": batch.clone(), "attention_mask": torch.ones_like(batch)} for batch in CALIBRATION_BATCHES
        ]
        mask = SparseMask.from_gradients(llama, batches, 0.01)
        again = mask.with_gradient(llama, batches)
    assert mask.digest == expected.digest
    assert again.gradient is not None
    assert expected.gradient is not None
    assert same_bits(again.gradient, expected.gradient)
    assert not mask.ids.is_inference()


def test_sparse_gradients_of_an_embedding_count_like_dense_ones() -> None:
    ids = torch.tensor([[1, 2, 1], [3, 3, 3]])
    masks = []
    for sparse in (True, False):
        embedding = nn.Embedding(6, 4, sparse=sparse)
        embedding.weight.data = torch.arange(24.0).view(6, 4).cos()
        model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, 2))
        model[2].weight.data = torch.arange(24.0).view(2, 12).sin()
        model[2].bias.data.zero_()
        masks.append(SparseMask.from_gradients(model, [ids], 0.4, loss=squared))
    first, second = masks
    assert any(name == "0.weight" for name, *_ in first.ranges())
    assert first.digest == second.digest
    assert torch.equal(first.scores, second.scores)  # type: ignore[arg-type]
    assert torch.equal(first.gradient, second.gradient)  # type: ignore[arg-type]


def test_a_loss_that_is_no_scalar_is_rejected() -> None:
    model = nn.Linear(4, 3)
    for loss, shape in ((lambda m, b: m(b), r"\[3, 3\]"), (lambda m, b: (m(b).sum(), 1), "tuple")):
        with pytest.raises(MaskError, match=f"batch 0 must be a tensor with one element, got {shape}"):
            SparseMask.from_gradients(model, [X], 0.5, loss=loss)  # type: ignore[arg-type]


def test_texts_without_a_token_to_predict_are_named(llama: nn.Module) -> None:
    with pytest.raises(DataError, match="no token to predict"):
        SparseMask.from_gradients(llama, [torch.tensor([[3], [4]])])


@pytest.fixture
def odd_defaults() -> Iterator[None]:
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


Maker = Callable[[nn.Module], SparseMask]
MAKERS: dict[str, Maker] = {
    "sensitivity": lambda model: SparseMask.from_gradients(model, CALIBRATION_BATCHES, 0.01),
    "gradient": lambda model: SparseMask.random(model, 0.01, 1).with_gradient(model, CALIBRATION_BATCHES),
    "magnitude": lambda model: SparseMask.magnitude(model, 0.01),
    "random": lambda model: SparseMask.random(model, 0.01, 1),
    "dense random": lambda model: SparseMask.random(model, 0.9, 1),
    "dense": SparseMask.dense,
    "parameters": lambda model: SparseMask.of_parameters(model, ["model.norm.weight"]),
    "loaded": lambda model: SparseMask.from_bytes(SparseMask.random(model, 0.01, 1).to_bytes(), model),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_default_device_and_dtype_do_not_matter(llama: nn.Module, maker: Maker, request: pytest.FixtureRequest) -> None:
    expected = maker(llama)
    request.getfixturevalue("odd_defaults")
    mask = maker(llama)
    assert mask.digest == expected.digest
    for a, b in ((mask.gradient, expected.gradient), (mask.scores, expected.scores)):
        assert (a is None) == (b is None)
        assert a is None or b is None or same_bits(a, b)


def peak_resident_bytes(action: Callable[[], object]) -> int:
    """Peak memory of this process during an action, on top of what it had: also what torch's operators need inside."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    except OSError:
        pytest.skip("needs Linux's /proc to measure memory")
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def test_selection_needs_memory_for_a_piece_and_not_for_the_tensor() -> None:
    values = torch.arange(1 << 23, dtype=torch.float32).remainder(1_000_003).sin().abs()
    ids, best = select_largest([values], 1000)
    assert torch.equal(best.sort().values, torch.topk(values, 1000).values.sort().values)
    assert torch.equal(values[ids], best)
    assert peak_resident_bytes(lambda: select_largest([values], 1000)) < 4 << 23  # torch.topk over all needs 16


def test_a_random_mask_needs_little_memory() -> None:
    with torch.device("meta"):
        model = nn.Linear(4096, 4096)
    k = round(0.2 * 4096 * 4097)
    assert peak_resident_bytes(lambda: SparseMask.random(model, 0.2, 1)) < 30 * k


@pytest.mark.parametrize("maker", ["sensitivity", "gradient", "magnitude"])
def test_models_without_values_are_rejected(maker: str) -> None:
    model = make_model()
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.to("meta"))  # type: ignore[union-attr]
    with pytest.raises(
        ModelError, match=r"parameter '.*' is on the meta device, so it has no values; load the weights"
    ):
        MAKERS[maker](make_model().to("meta"))
    if maker != "gradient":  # which needs no gradient of a parameter without masked elements
        with pytest.raises(ModelError, match=r"parameter 'model\.norm\.weight' is on the meta device"):
            MAKERS[maker](model)
    with torch.inference_mode():
        model = make_model()
    with pytest.raises(ModelError, match=r"was made in inference mode.*; build or load the model outside"):
        MAKERS[maker](model)


def test_weights_that_are_nan_have_no_magnitude(llama: nn.Module) -> None:
    llama.model.norm.weight.data[3] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(MaskError, match=r"parameter 'model\.norm\.weight' contains NaN"):
        SparseMask.magnitude(llama, 0.01)


def test_an_interrupt_at_any_place_leaves_no_trace() -> None:
    """A hook that stays on a parameter would empty the gradients of the user's own training."""
    with Interrupts().active() as interrupts:
        calibrated_regression()
    names = ("_restore_parameters", "_restore_modules")
    restoring = [place for place, name in enumerate(interrupts.functions) if name in names]
    for place in [*random.Random(0).sample(range(interrupts.seen), 10), *restoring[::2]]:
        model = make_mlp().train()
        with contextlib.suppress(KeyboardInterrupt), Interrupts(place).active():
            calibrated_regression(model)
        gc.collect()  # a context that was interrupted while it was entered is left when it is freed
        assert all(module.training for module in model.modules())
        assert all(p.requires_grad and not p._backward_hooks for p in model.parameters())
        squared_output(model)().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def calibrated_regression(model: nn.Module | None = None) -> SparseMask:
    """A mask of a small regression model, from the gradients of two batches."""
    return SparseMask.from_gradients(
        make_mlp().train() if model is None else model, [1.0, 2.0], 0.3,
        loss=lambda net, scale: scale * squared_output(net)(),
    )  # fmt: skip
