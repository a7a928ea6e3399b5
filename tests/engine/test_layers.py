"""Masks of parameters, gradients attached to a mask, and the transformer blocks of a model."""

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.bench.measure import peak_bytes
from meerkat_engine.engine.errors import MaskError, ModelError
from meerkat_engine.engine.layers import decoder_layers, dominant_layer, parameter_names
from meerkat_engine.engine.parameters import ParameterTable

from helpers.losses import CALIBRATION_BATCHES, gradient_moments
from helpers.models import make_model
from helpers.tensors import same_bits

BLOCKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}


def test_decoder_layers_lists_the_blocks_in_order(architecture: str) -> None:
    model = make_model(architecture)
    layers = decoder_layers(model)
    assert layers == [f"{BLOCKS.get(architecture, 'model.layers')}.{i}" for i in range(2)]
    assert len({type(model.get_submodule(layer)) for layer in layers}) == 1
    names = parameter_names(model, layers[1])
    assert names == [f"{layers[1]}.{name}" for name, _ in model.get_submodule(layers[1]).named_parameters()]


def test_block_10_is_not_part_of_block_1(llama: nn.Module) -> None:
    layers = llama.model.layers  # type: ignore[union-attr]
    while len(layers) < 11:
        layers.append(make_model(seed=len(layers)).model.layers[0])  # type: ignore[operator, union-attr, arg-type, index]
    one, ten = (parameter_names(llama, f"model.layers.{i}") for i in (1, 10))
    assert len(one) == len(ten) == 9
    assert not set(one) & set(ten)


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))], ids=["flat", "list"]
)
def test_other_modules_have_no_blocks(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="is no causal language model of transformers"):
        decoder_layers(model)


def test_the_dominant_block_has_the_largest_squared_gradient(architecture: str) -> None:
    model = make_model(architecture)
    squares, _ = gradient_moments(model)
    totals = {}
    for layer in decoder_layers(model):
        ids = SparseMask.of_parameters(model, parameter_names(model, layer)).ids
        totals[layer] = squares[ids].sum().item()
    first, second = sorted(totals, key=lambda layer: totals[layer])
    assert totals[second] > 1.0005 * totals[first]
    before = [p.requires_grad for p in model.parameters()]
    assert dominant_layer(model, CALIBRATION_BATCHES) == second
    with torch.inference_mode():
        assert dominant_layer(model, CALIBRATION_BATCHES) == second
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dominant_block_moves_with_the_gradient(dtype: torch.dtype) -> None:
    """Scaling a block's norm weights down or up makes its own gradient the largest or the smallest."""
    dominant = []
    for factor in (1e-3, 1e3):
        model = make_model(dtype=dtype)
        model.model.layers[1].input_layernorm.weight.data *= factor  # type: ignore[union-attr, index]
        model.model.layers[1].post_attention_layernorm.weight.data *= factor  # type: ignore[union-attr, index]
        dominant.append(dominant_layer(model, CALIBRATION_BATCHES))
    assert len(set(dominant)) == 2


def test_a_mask_of_parameters_contains_all_their_elements(architecture: str) -> None:
    model = make_model(architecture)
    table = ParameterTable.of(model)
    names = [table.names[5], table.names[2]]
    mask = SparseMask.of_parameters(model, names, "two of them")
    wanted = torch.cat([torch.full((p.numel(),), name in names) for name, p in model.named_parameters()])
    assert torch.equal(mask.ids, wanted.nonzero().view(-1))
    assert mask.source == "two of them"
    assert mask.density == len(mask) / table.size
    opt = SparseZO(model, mask, lr=0.1)
    assert opt.weights.names() == sorted(names, key=table.names.index)
    before = {name: p.clone() for name, p in model.named_parameters()}
    opt.apply(1, 1.0)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == set(names)


def test_missing_parameters_are_named(llama: nn.Module) -> None:
    with pytest.raises(MaskError, match=r"no floating-point parameter 'lm_head\.weight'"):  # tied to the embedding
        SparseMask.of_parameters(llama, ["model.norm.weight", "lm_head.weight", "x"])
    with pytest.raises(MaskError, match="at least one parameter name"):
        SparseMask.of_parameters(llama, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_attached_gradient_equals_the_calibration_gradient(architecture: str, dtype: torch.dtype) -> None:
    model = make_model(architecture, dtype)
    mask = SparseMask.from_gradients(model, CALIBRATION_BATCHES, density=0.02, calibration="three")
    bare = SparseMask(ids=mask.ids, table=mask.table, density=mask.density, source="other")
    attached = bare.with_gradient(model, CALIBRATION_BATCHES, calibration="three")
    assert attached.gradient is not None
    assert mask.gradient is not None
    assert same_bits(attached.gradient, mask.gradient)
    assert (attached.digest, attached.source, attached.calibration) == (bare.digest, "other", "three")
    assert bare.gradient is None


def test_a_gradient_can_be_attached_to_any_mask(llama: nn.Module) -> None:
    _, means = gradient_moments(llama)
    layer = parameter_names(llama, decoder_layers(llama)[0])
    for mask in (
        SparseMask.random(llama, 0.01, 3), SparseMask.magnitude(llama, 0.01), SparseMask.of_parameters(llama, layer)
    ):  # fmt: skip
        attached = mask.with_gradient(llama, CALIBRATION_BATCHES)
        assert attached.gradient is not None
        torch.testing.assert_close(attached.gradient, means[mask.ids], rtol=1e-3, atol=1e-7)


def test_with_gradient_rejects_unusable_models_and_losses(llama: nn.Module) -> None:
    mask = SparseMask.of_parameters(llama, ["model.norm.weight"])
    with pytest.raises(MaskError, match="no calibration batch"):
        mask.with_gradient(llama, [])
    with pytest.raises(MaskError, match="another model"):
        mask.with_gradient(make_model("opt"), CALIBRATION_BATCHES)
    with pytest.raises(MaskError, match="does not depend on the chosen parameters"):
        mask.with_gradient(llama, [None], loss=lambda *_: torch.zeros(()))
    with pytest.raises(MaskError, match=r"gradient of 'model\.norm\.weight' is not finite"):
        mask.with_gradient(llama, [None], loss=lambda model, _: (model.model.norm.weight[0] * 0).sqrt())


def test_with_gradient_holds_at_most_two_gradients() -> None:
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(8)])
    mask, x = SparseMask.random(model, 1e-3, 0), torch.ones(1, 512)
    weight = 512 * 512 * 4
    peak = peak_bytes(lambda: mask.with_gradient(model, [x], loss=lambda m, b: m(b).sum()), torch.device("cpu"))
    assert weight <= peak < 3.5 * weight  # one gradient, at most two while it is made; not eight, not sixteen


def test_only_parameters_with_masked_elements_get_a_gradient(llama: nn.Module) -> None:
    llama.requires_grad_(True)
    mask = SparseMask.of_parameters(llama, ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    seen: list[list[str]] = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append([name for name, p in model.named_parameters() if p.requires_grad])
        assert all(p.grad is None for p in model.parameters())
        return model(input_ids=batch, labels=batch).loss  # type: ignore[no-any-return]

    mask.with_gradient(llama, CALIBRATION_BATCHES, loss=loss)
    assert seen == [["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]] * 3
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
