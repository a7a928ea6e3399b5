"""A model with frozen weights is the plain model, bit for bit, to all that reads it. Nothing can write it."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meerkat_engine import SparseMask
from meerkat_engine.engine.errors import ModelError
from meerkat_engine.engine.frozen.freeze import freeze, thaw
from meerkat_engine.engine.frozen.weight import FrozenWeight, frozen_weights
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.engine.weights import MaskedWeights

from helpers.frozen import FAMILIES, IDS, build_family, corners_mask, frozen_copy
from helpers.tensors import same_bits

CONTEXTS = (torch.enable_grad, torch.no_grad, torch.inference_mode)


def change(model: nn.Module, mask: SparseMask) -> MaskedWeights:
    """Adds 0.5 to every other masked element, and turns the sign of the others."""
    weights = MaskedWeights(model, mask, "torch")
    masters = weights.masters()
    weights.set_masters_(torch.where(torch.arange(len(masters)) % 2 == 0, masters + 0.5, -masters))
    return weights


def changed_pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A plain model and its frozen twin, with the same changed masked elements."""
    plain = build_family(name, dtype)
    frozen = frozen_copy(plain)
    for model in (plain, frozen):
        change(model, corners_mask(model))
    return plain, frozen


@pytest.fixture
def frozen() -> Any:
    return changed_pair("Llama")[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_the_bits_of_the_plain_model(name: str, dtype: torch.dtype) -> None:
    plain, frozen = changed_pair(name, dtype)
    if name == "Mamba":  # torch folds a batch that is not contiguous only if the weight requires gradients
        plain.requires_grad_(False)
    assert frozen_weights(frozen).keys() == dict(plain.named_parameters()).keys()
    before = build_family(name, dtype)(input_ids=IDS).logits
    for context in CONTEXTS:
        with context():
            logits = plain(input_ids=IDS).logits
            assert not torch.equal(logits, before)
            assert same_bits(frozen(input_ids=IDS).logits, logits)
    assert fingerprint(frozen) == fingerprint(plain)


class Scaled(nn.Module):
    """Parameters that belong to no layer: a scalar, one that is transposed in memory, and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.turned = nn.Parameter(torch.arange(12.0).view(4, 3).t() / 12)
        self.empty = nn.Parameter(torch.empty(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([(x @ self.turned) * self.scale, self.empty])


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "embedding with padding": (
        lambda: nn.Sequential(nn.Embedding(10, 6, padding_idx=2), nn.LayerNorm(6), nn.Linear(6, 3)),
        torch.tensor([[2, 9, 2], [0, 0, 5]]),
    ),
    "bag": (lambda: nn.EmbeddingBag(10, 4), torch.tensor([[2, 9, 2], [0, 0, 5]])),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.PReLU(4)),
        torch.linspace(-1, 1, 100).view(1, 2, 5, 10),
    ),
    "LSTM": (lambda: nn.LSTM(4, 6, 2), torch.linspace(-1, 1, 24).view(3, 2, 4)),
    "normalized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
        torch.linspace(-1, 1, 8).view(2, 4),
    ),
    "loose parameters": (Scaled, torch.linspace(-1, 1, 6).view(2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_other_kinds_compute_the_same_bits(name: str) -> None:
    make, x = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = make().eval()
    if name == "loose parameters":
        plain.turned.data = plain.turned.data.contiguous()  # type: ignore[union-attr, operator]
        frozen = copy.deepcopy(plain)
        frozen.turned.data = frozen.turned.data.t().contiguous().t()  # type: ignore[union-attr, operator]
        freeze(frozen)
    else:
        frozen = frozen_copy(plain)
    mask = SparseMask.random(plain, 0.3, 1)
    for model in (plain, frozen):
        change(model, mask)
    for context in CONTEXTS:
        with context():
            out, wanted = (model(x) for model in (frozen, plain))
            out, wanted = (value[0] if isinstance(value, tuple) else value for value in (out, wanted))
            assert same_bits(out, wanted)


def test_rows_of_an_embedding_are_those_of_the_dense_weight(frozen: Any) -> None:
    weight = frozen.model.embed_tokens.weight
    dense = weight.dense()
    for index in ([0, 95, 0, 0], [], list(range(96)), [17]):
        assert same_bits(weight.rows(torch.tensor(index, dtype=torch.int64)), dense[index])
    assert same_bits(functional.embedding(torch.tensor(5, dtype=torch.int32), weight), dense[5])
    for index in (-1, 96):
        with pytest.raises(IndexError, match="index out of range"):
            functional.embedding(torch.tensor([index]), weight)


def test_every_parameter_is_a_frozen_parameter_once() -> None:
    plain = build_family("Llama tied")
    frozen: Any = frozen_copy(plain)
    assert frozen.lm_head.weight is frozen.model.embed_tokens.weight
    assert all(type(p) is FrozenWeight and isinstance(p, nn.Parameter) for p in frozen.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    thaw(frozen.lm_head)
    assert same_bits(frozen.lm_head.weight, plain.lm_head.weight)  # type: ignore[union-attr, arg-type]


WRITES: dict[str, Callable[[Any], object]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(w.shape)),
    "an item": lambda w: w.__setitem__(0, 1.0),
    "+=": lambda w: w.__iadd__(1),
    "*=": lambda w: w.__imul__(2),
    "fill_": lambda w: torch.fill_(w, 0),
    "out=": lambda w: torch.add(torch.ones(w.shape), 1, out=w),
    "out= of two": lambda w: torch.max(torch.ones(3, 32), 0, out=(w, torch.empty(0, dtype=torch.int64))),
    "a list of tensors": lambda w: torch._foreach_add_([w], 1.0),
    "initialization": nn.init.kaiming_uniform_,
    "inplace=True": lambda w: functional.relu(w, inplace=True),
    "norms of rows": lambda w: functional.embedding(torch.tensor([1]), w, max_norm=0.1),
    "data": lambda w: setattr(w, "data", torch.zeros(w.shape)),
    "data in place": lambda w: w.data.mul_(0),
    "resize_": lambda w: w.resize_(3),
    "requires_grad_": lambda w: w.requires_grad_(),
    "requires_grad_(True)": lambda w: w.requires_grad_(requires_grad=True),
    "requires_grad": lambda w: setattr(w, "requires_grad", True),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_would_write_it_raises_and_changes_nothing(frozen: Any, name: str) -> None:
    before = fingerprint(frozen)
    weight = frozen.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"load the model with plain weights|load it in its dtype, on its device"):
        WRITES[name](weight)
    assert fingerprint(frozen) == before
    assert not weight.requires_grad


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.share_memory])
def test_a_frozen_model_stays_what_it_is(frozen: Any, move: Callable[[nn.Module], object]) -> None:
    before = fingerprint(frozen)
    with pytest.raises(ModelError):
        move(frozen)
    assert fingerprint(frozen) == before


def test_it_may_be_moved_to_where_it_is(frozen: Any) -> None:
    """As trainers do."""
    parameters = list(frozen.parameters())
    for how in (("cpu",), (torch.float32,), ("cpu", torch.float32, True), (torch.ones(1),)):
        frozen.to(*how)
        assert all(p.to(*how) is p for p in parameters)
    frozen.requires_grad_(False).zero_grad()
    assert all(a is b for a, b in zip(frozen.parameters(), parameters, strict=True))
    for copied in (parameters[0].to("cpu", copy=True), parameters[0].to(torch.float32, False, True)):
        assert type(copied) is Tensor
    assert type(parameters[0].to(torch.float64)) is Tensor


def test_another_state_cannot_be_loaded(frozen: Any) -> None:
    before, other = fingerprint(frozen), build_family("Llama").state_dict()
    with pytest.raises(RuntimeError, match="copy_ would write a frozen weight"):
        frozen.load_state_dict(other)
    assert fingerprint(frozen) == before


def test_operations_that_hide_it_are_refused(frozen: Any) -> None:
    weight = frozen.lm_head.weight
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(ModelError, match=r"add\.Tensor .* use its dense\(\)"):
        weight + 1


def test_a_copy_shares_the_stored_values_and_has_live_values_of_its_own() -> None:
    _, frozen = changed_pair("Llama tied")
    twin = copy.deepcopy(frozen)
    assert fingerprint(twin) == fingerprint(frozen)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    for a, b in zip(twin.parameters(), frozen.parameters(), strict=True):
        assert a is not b
        assert a.stored is b.stored
        assert a.points is not b.points
        assert a.points is twin.lm_head.weight.points
    before = fingerprint(frozen)
    for parameter in twin.parameters():
        parameter.values.add_(1)
    assert fingerprint(frozen) == before != fingerprint(twin)


def test_its_state_is_that_of_the_plain_model() -> None:
    plain, frozen = changed_pair("Llama tied")
    file = io.BytesIO()
    torch.save(frozen.state_dict(), file)
    file.seek(0)
    other = build_family("Llama tied")
    other.load_state_dict(torch.load(file, weights_only=True))
    assert fingerprint(other) == fingerprint(plain)
    assert all(type(value) is Tensor for value in frozen.state_dict().values())
    assert frozen.state_dict(keep_vars=True)["lm_head.weight"] is frozen.lm_head.weight


def test_it_says_what_it_is(frozen: Any) -> None:
    weight = frozen.model.norm.weight
    assert repr(weight) == (
        f"FrozenWeight(float32 (32,) computed in torch.float32 on cpu, {weight.offsets.numel()} masked elements "
        f"beside it)"
    )
    assert weight.offsets.numel() > 2
    assert "LlamaRMSNorm((32,)" in repr(frozen)


@pytest.mark.parametrize("name", ["Llama", "Llama tied", "GPT2", "Gemma2", "Mixtral"])
def test_transformers_treats_it_as_the_plain_model(name: str, tmp_path: Path) -> None:
    plain, frozen = changed_pair(name)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(frozen.generate(IDS, **options), plain.generate(IDS, **options))
    for model in (plain, frozen):
        model.tie_weights()
    for of in (
        lambda model: model.num_parameters(),
        lambda model: model.get_memory_footprint(),
        lambda model: (model.dtype, model.device),
        lambda model: model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    ):
        assert of(frozen) == of(plain)
    frozen.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert fingerprint(loaded) == fingerprint(plain)
    with pytest.raises(ModelError, match="cannot be moved or cast"):
        frozen.resize_token_embeddings(120)
