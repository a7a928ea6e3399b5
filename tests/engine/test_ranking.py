"""Masks by sensitivity with the gradients of a bounded number of elements at a time: the bits of a single pass."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meerkat_engine import SparseMask
from meerkat_engine.engine import sensitivity
from meerkat_engine.engine.errors import MaskError
from meerkat_engine.engine.frozen.freeze import freeze
from meerkat_engine.engine.frozen.stored import PlainStored
from meerkat_engine.engine.lm.text_loss import language_model_loss

from helpers.frozen import FAMILIES, IDS, build_family, frozen_copy
from helpers.losses import CALIBRATION_BATCHES
from helpers.models import make_model
from helpers.tensors import same_bits

X = torch.linspace(-1, 1, 12).view(3, 4)


def assert_same(mask: SparseMask, expected: SparseMask) -> None:
    assert mask.digest == expected.digest
    for values, wanted in ((mask.scores, expected.scores), (mask.gradient, expected.gradient)):
        assert values is not None
        assert wanted is not None
        assert same_bits(values, wanted)
    assert (mask.density, mask.source, mask.calibration) == (expected.density, expected.source, expected.calibration)


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()  # type: ignore[no-any-return]


def make_layers(**settings: Any) -> nn.Module:
    """Five layers of 20 elements each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(4, 4, **settings) for _ in range(5)])


@pytest.mark.parametrize(
    ("at_a_time", "density"), [(1, 0.02), (1000, 0.001), (4000, 0.001), (4000, 0.7), (10**9, 0.02)]
)
def test_masks_have_the_bits_of_a_single_pass(architecture: str, at_a_time: int, density: float) -> None:
    model = make_model(architecture)
    expected = SparseMask.from_gradients(model, CALIBRATION_BATCHES, density)
    assert_same(SparseMask.from_gradients(model, CALIBRATION_BATCHES, density, at_a_time=at_a_time), expected)


@pytest.mark.parametrize(("dtype", "at_a_time"), [(torch.float32, 1), (torch.bfloat16, 4000)], ids=str)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("GPT2 untied", "Mamba")])
def test_masks_of_frozen_models_have_the_bits_of_a_single_pass(name: str, dtype: torch.dtype, at_a_time: int) -> None:
    plain = build_family(name, dtype)
    frozen = frozen_copy(plain)
    expected = SparseMask.from_gradients(plain, [IDS, IDS[:2, :5]], 0.05)
    assert_same(SparseMask.from_gradients(plain, [IDS, IDS[:2, :5]], 0.05, at_a_time=at_a_time), expected)
    expected = SparseMask.from_gradients(frozen, [IDS, IDS[:2, :5]], 0.05, frozen=True)
    mask = SparseMask.from_gradients(frozen, [IDS, IDS[:2, :5]], 0.05, frozen=True, at_a_time=at_a_time)
    assert_same(mask, expected)


def test_forward_passes_have_the_bits_of_weights_that_require_gradients() -> None:
    """Torch multiplies by these in another way if an input is not contiguous, whichever gradients are computed."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        for layer in model.children():
            x = layer(x.transpose(0, 1).contiguous().transpose(0, 1))
        return x.square().mean()

    x = torch.linspace(-3, 2, 60).sin().view(3, 5, 4)
    model = make_layers()
    weight = model.get_submodule("0").weight.detach()  # type: ignore[operator]
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    results = [nn.functional.linear(strided, weight.clone().requires_grad_(needs)) for needs in (False, True)]
    if torch.equal(*results):
        pytest.skip("torch multiplies in one way on this machine")
    expected = SparseMask.from_gradients(model, [x], 0.9, loss=loss)
    for at_a_time in (1, 20, 40):
        assert_same(SparseMask.from_gradients(model, [x], 0.9, loss=loss, at_a_time=at_a_time), expected)


def test_frozen_parameters_of_a_plain_model_are_left_out() -> None:
    model = make_layers()
    model.get_submodule("1").requires_grad_(False)
    expected = SparseMask.from_gradients(model, [X], 0.5, loss=squared)
    assert_same(SparseMask.from_gradients(model, [X], 0.5, loss=squared, at_a_time=20), expected)
    assert not ((expected.ids >= 20) & (expected.ids < 40)).any()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("at_a_time", [1, 7, 100])
def test_ties_go_to_the_lower_id_across_groups(at_a_time: int) -> None:
    def total(model: nn.Module, _: object) -> Tensor:
        weights = [p.sum() for p in model.parameters()]
        return sum(weights[1:], 3 * weights[2] + weights[0])  # type: ignore[no-any-return]

    mask = SparseMask.from_gradients(make_layers(), [0], 0.4, loss=total, at_a_time=at_a_time)
    best = range(20, 36)  # the weight of the second layer
    assert mask.ids.tolist() == [*range(20), *best, 36, 37, 38, 39]
    mask = SparseMask.from_gradients(make_layers(), [0], 0.3, loss=total, at_a_time=at_a_time)
    assert mask.ids.tolist() == [*range(14), *best]


@pytest.mark.parametrize("is_frozen", [False, True], ids=["plain", "frozen"])
@pytest.mark.parametrize(("at_a_time", "groups"), [(None, 1), (100, 1), (99, 2), (40, 3), (20, 5), (19, 10), (1, 10)])
def test_each_group_has_a_pass_of_its_own_that_ends_at_its_first_parameter(
    at_a_time: int | None, groups: int, is_frozen: bool
) -> None:
    passes: list[list[str]] = []

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, layer: str) -> Tensor:
            ctx.layer = layer
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            passes[-1].append(ctx.layer)
            return grad, None

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        passes.append([])
        for name, layer in model.named_children():
            x = Note.apply(layer(x), name)
        return x.square().mean()

    model = make_layers()
    if is_frozen:
        freeze(model)
    SparseMask.from_gradients(model, [X, X], 0.1, loss=loss, frozen=True, at_a_time=at_a_time)
    assert len(passes) == 2 * groups
    if groups >= 5:
        firsts = [i * 5 // groups for i in range(groups)]
        assert passes[::2] == passes[1::2] == [["4", "3", "2", "1", "0"][: 5 - first] for first in firsts]


@pytest.mark.parametrize(("at_a_time", "elements"), [(None, 100), (100, 100), (70, 60), (40, 40), (19, 16), (1, 16)])
def test_no_more_is_accumulated_at_a_time(
    at_a_time: int | None, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accumulators are all that ``sensitivity`` makes with zeros and zeros_like."""
    alive, most = 0, 0

    def freed(size: int) -> None:
        nonlocal alive
        alive -= size

    def spy(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal alive, most
            tensor = make(*args, **kwargs)
            alive += tensor.nbytes
            most = max(most, alive)
            weakref.finalize(tensor, freed, tensor.nbytes)
            return tensor

        return made

    class Torch:
        zeros, zeros_like = staticmethod(spy(torch.zeros)), staticmethod(spy(torch.zeros_like))

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(sensitivity, "torch", Torch())
    SparseMask.from_gradients(make_layers(), [X, X], 0.1, loss=squared, at_a_time=at_a_time)
    assert most == 8 * elements
    assert alive == 0


def test_dense_weights_of_frozen_layers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of other groups nor the group's own: a backward pass makes them again, one at a time."""
    model = frozen_copy(build_family("Llama", num_hidden_layers=6, vocab_size=32))
    matrices = [p.numel() for p in model.parameters() if p.dim() == 2]
    alive, most, dense = 0, 0, PlainStored.dense

    def freed(size: int) -> None:
        nonlocal alive
        alive -= size

    def spy(self: PlainStored, *args: Any) -> Tensor:
        nonlocal alive, most
        tensor = dense(self, *args)
        if tensor.dim() == 2:
            alive += tensor.numel()
            most = max(most, alive)
            weakref.finalize(tensor, freed, tensor.numel())
        return tensor

    monkeypatch.setattr(PlainStored, "dense", spy)
    SparseMask.from_gradients(model, [IDS % 32], 0.01, frozen=True, at_a_time=4000)
    assert 0 < most <= 2 * max(matrices) < sum(matrices) / 10
    assert alive == 0


def test_batches_that_can_be_read_once_are_kept() -> None:
    model = make_layers()
    expected = SparseMask.from_gradients(model, [X, 2 * X], 0.5, loss=squared)
    for at_a_time in (None, 20):
        batches: Iterator[Tensor] = (scale * X for scale in (1, 2))
        assert_same(SparseMask.from_gradients(model, batches, 0.5, loss=squared, at_a_time=at_a_time), expected)


def test_batches_that_change_from_pass_to_pass_are_an_error() -> None:
    class Fewer:
        left = 3

        def __iter__(self) -> Iterator[Tensor]:
            self.left -= 1
            return iter([X] * self.left)

    with pytest.raises(MaskError, match="there were 2 calibration batches in one pass and 1 in the next; give a list"):
        SparseMask.from_gradients(make_layers(), Fewer(), 0.5, loss=squared, at_a_time=20)


@pytest.mark.parametrize("is_frozen", [False, True], ids=["plain", "frozen"])
@pytest.mark.parametrize("unused", ["0", "4"])
def test_groups_that_the_loss_does_not_depend_on_have_no_sensitivity(unused: str, is_frozen: bool) -> None:
    """Their pass has no gradient; an error in it would depend on how parameters are grouped."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        for name, layer in model.named_children():
            x = x if name == unused else layer(x)
        return x.square().mean()

    model = make_layers()
    if is_frozen:
        freeze(model)
    for density in (0.5, 0.9):
        expected = SparseMask.from_gradients(model, [X], density, loss=loss, frozen=True)
        mask = SparseMask.from_gradients(model, [X], density, loss=loss, frozen=True, at_a_time=20)
        assert_same(mask, expected)


@pytest.mark.parametrize("is_frozen", [False, True], ids=["plain", "frozen"])
@pytest.mark.parametrize("at_a_time", [None, 20])
def test_a_loss_that_depends_on_no_parameter_is_an_error(at_a_time: int | None, is_frozen: bool) -> None:
    model = make_layers()
    if is_frozen:
        freeze(model)
    for loss in (lambda _, x: x.sum(), lambda _, x: x.clone().requires_grad_().sum()):
        with pytest.raises(MaskError, match="does not depend on the chosen parameters"):
            SparseMask.from_gradients(model, [X], 0.5, loss=loss, frozen=True, at_a_time=at_a_time)


def test_random_numbers_and_buffers_are_the_same_in_each_pass() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = make_layers()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layers(x + self.calls * torch.rand_like(x))  # type: ignore[no-any-return]

    model = Noisy()
    state = torch.get_rng_state()
    expected = SparseMask.from_gradients(model, [X, X], 0.5, loss=squared)
    assert_same(SparseMask.from_gradients(model, [X, X], 0.5, loss=squared, at_a_time=1), expected)
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_parameters_are_no_group() -> None:
    model = make_layers()
    model.register_parameter("empty", nn.Parameter(torch.empty(0, 4)))
    expected = SparseMask.from_gradients(make_layers(), [X], 0.5, loss=squared)
    mask = SparseMask.from_gradients(model, [X], 0.5, loss=squared, at_a_time=1)
    assert mask.ids.tolist() == expected.ids.tolist()


def test_a_gradient_that_is_not_finite_is_an_error_in_any_group() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean() + 1e30 * next(model.parameters()).sum()  # type: ignore[no-any-return]

    with pytest.raises(MaskError, match=r"the gradient of '0.weight' is not finite or overflows when squared"):
        SparseMask.from_gradients(make_layers(), [X], 0.5, loss=loss, at_a_time=20)


@pytest.mark.parametrize("at_a_time", [0, -1])
def test_a_number_below_one_is_an_error(at_a_time: int) -> None:
    with pytest.raises(MaskError, match=f"at_a_time must be at least 1, got {at_a_time}"):
        SparseMask.from_gradients(make_layers(), [X], 0.5, loss=squared, at_a_time=at_a_time)


def test_inference_mode_works() -> None:
    model = make_model()
    with torch.inference_mode():
        expected = SparseMask.from_gradients(model, CALIBRATION_BATCHES, 0.01, loss=language_model_loss)
        mask = SparseMask.from_gradients(model, CALIBRATION_BATCHES, 0.01, loss=language_model_loss, at_a_time=2000)
    assert_same(mask, expected)
