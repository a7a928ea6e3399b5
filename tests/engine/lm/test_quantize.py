"""Models whose weights are kept in few bits compute what the dense model of these values computes."""

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.frozen.stored import PlainStored
from meerkat_engine.engine.frozen.weight import frozen_weights
from meerkat_engine.engine.lm.models import load_model
from meerkat_engine.engine.lm.quantize import Quantize, freeze_base
from meerkat_engine.engine.lm.text_loss import language_model_loss
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.engine.sgd import sgd_steps
from meerkat_engine.engine.weights import MaskedWeights

from helpers.constants import CPU, DTYPES
from helpers.frozen import FAMILIES, IDS, build_family
from helpers.gguf import write_gguf
from helpers.models import make_byte_tokenizer
from helpers.tensors import same_bits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*GGUF.*")

QUANTIZERS = [kind for kind in Quantize if kind not in (Quantize.NONE, Quantize.AS_STORED)]
PACKAGES = {Quantize.NF4: "bitsandbytes", Quantize.INT8: "bitsandbytes", Quantize.TORCHAO_INT8: "torchao"}
TOKENS = 300  # as many as the byte-level tokenizer needs


def need(kind: Quantize) -> Quantize:
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind], reason="needs the extra quantize")
    return kind


def save(path: Path, name: str = "Llama", dtype: torch.dtype = torch.bfloat16) -> str:
    build_family(name, dtype, vocab_size=TOKENS, intermediate_size=64).save_pretrained(path)  # type: ignore[operator]
    make_byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("quantize"))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("Llama", "GPT2 untied", "Mamba")])
def test_a_model_as_stored_is_the_plain_model(name: str, stored: torch.dtype, tmp_path: Path) -> None:
    source = save(tmp_path, name, stored)
    for dtype in (torch.float32, torch.bfloat16):
        plain: Any = load_model(source, dtype).model
        kept: Any = load_model(source, dtype, quantize=Quantize.AS_STORED).model
        assert {p.stored.format for p in kept.parameters()} == {str(stored).removeprefix("torch.")}
        assert {p.dtype for p in kept.parameters()} == {kept.dtype} == {dtype}
        buffers = zip(plain.named_buffers(), kept.named_buffers(), strict=True)
        assert all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in buffers)
        assert fingerprint(kept) == fingerprint(plain)
        assert same_bits(logits_of(kept), logits_of(plain))


def mapped_ranges(file: str) -> list[tuple[int, int]]:
    """Addresses at which a file is mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if line[-1] == file]  # type: ignore[misc]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_as_stored_stay_in_the_mapped_file(checkpoint: str) -> None:
    weights = frozen_weights(load_model(checkpoint, quantize=Quantize.AS_STORED).model)
    ranges = mapped_ranges(f"{checkpoint}/model.safetensors")
    for weight in weights.values():
        assert isinstance(weight.stored, PlainStored)
        address, size = weight.stored.values.data_ptr(), weight.stored.nbytes
        assert size == 2 * weight.numel()
        assert any(start <= address and address + size <= stop for start, stop in ranges)


def test_a_few_weights_in_a_wider_dtype_lose_nothing(checkpoint: str, tmp_path: Path) -> None:
    source = save(tmp_path, "Llama", torch.float32)
    tensors = load_file(f"{source}/model.safetensors")
    mixed = {name: value if "norm" in name else value.bfloat16() for name, value in tensors.items()}
    save_file(mixed, f"{source}/model.safetensors", {"format": "pt"})
    kept = load_model(source, quantize=Quantize.AS_STORED).model
    assert fingerprint(kept) == fingerprint(load_model(source).model) != fingerprint(load_model(checkpoint).model)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen2 tied", "Mixtral"])
@pytest.mark.parametrize("kind", list(QUANTIZERS))
def test_a_quantized_model_is_the_plain_one_of_its_values(kind: Quantize, name: str, tmp_path: Path) -> None:
    """Logits, a step, a step of gradient descent and a mask by gradients, all to the bit."""
    source = save(tmp_path, name)
    kept = load_model(source, quantize=need(kind)).model
    plain = load_model(source).model
    before = fingerprint(plain)
    plain.load_state_dict({key: p.stored.dense(torch.float32, CPU) for key, p in frozen_weights(kept).items()}, False)
    assert fingerprint(kept) == fingerprint(plain) != before
    assert same_bits(logits_of(kept), logits_of(plain))
    found = []
    for model in (kept, plain):
        mask = SparseMask.from_gradients(model, [IDS], 0.02, frozen=True)
        opt = SparseZO(model, mask, lr=0.01, frozen=True, queries=2)
        loss = opt.step(lambda model=model: language_model_loss(model, IDS))  # type: ignore[misc]
        gradients = tuple(opt.projected_gradients)
        sgd_steps(model, MaskedWeights(model, mask), [lambda model=model: language_model_loss(model, IDS)], [0.1])  # type: ignore[misc]
        found.append((mask.digest, loss.item(), gradients, fingerprint(model)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "counts"),
    [("Llama", (14, 7)), ("Llama tied", (14, 6)), ("GPT2", (8, 20)), ("Qwen2Moe", (16, 19))],
)
def test_linear_layers_are_quantized_but_not_embeddings_and_heads(
    name: str, counts: tuple[int, int], tmp_path: Path
) -> None:
    weights = frozen_weights(load_model(save(tmp_path, name), quantize=need(Quantize.NF4)).model)
    formats = Counter(weight.stored.format for weight in weights.values())
    assert (formats["nf4"], formats["bfloat16"]) == counts
    kept = {key for key, weight in weights.items() if weight.stored.format != "nf4" and key.endswith("weight")}
    assert not [key for key in kept if "_proj" in key and "experts" not in key]


def transformers_config(kind: Quantize) -> Any:
    if kind is Quantize.NF4:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    if kind is Quantize.INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

    return TorchAoConfig(Int8WeightOnlyConfig())


def dequantized(module: nn.Module, kind: Quantize) -> Tensor | None:
    """The weight that a layer of transformers computes with; None for a plain layer."""
    weight: Any = getattr(module, "weight", None)
    if kind is Quantize.TORCHAO_INT8:
        return weight.dequantize() if hasattr(weight, "dequantize") and type(weight.data) is not Tensor else None  # type: ignore[no-any-return]
    import bitsandbytes

    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB)  # type: ignore[no-any-return]
    return None


@pytest.mark.parametrize(("name", "stored"), [("Llama", torch.bfloat16), ("OPT", torch.float32)], ids=str)
@pytest.mark.parametrize("kind", list(QUANTIZERS))
def test_the_values_are_those_of_transformers(kind: Quantize, name: str, stored: torch.dtype, tmp_path: Path) -> None:
    source = save(tmp_path, name, stored)
    weights = frozen_weights(load_model(source, quantize=need(kind)).model)
    theirs = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=transformers_config(kind), dtype=torch.float32, device_map="cpu"
    )
    dense = {f"{key}.weight": dequantized(module, kind) for key, module in theirs.named_modules()}
    expected = {key: value for key, value in dense.items() if value is not None}
    assert expected.keys() == {key for key, w in weights.items() if not isinstance(w.stored, PlainStored)}
    assert all(same_bits(weights[key].dense(), value.float()) for key, value in expected.items())


@pytest.mark.parametrize(
    ("block", "dtype", "tied"),
    [
        *itertools.product(["Q4_0", "Q4_1", "Q8_0"], DTYPES, [True]),
        *itertools.product(["Q4_0", "F16", "BF16", "F32"], [torch.float32], [False]),
    ],
    ids=str,
)
def test_gguf_blocks_are_kept_and_compute_the_same(block: str, dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    """Also those of query and key projections, whose rows are ordered anew."""
    model = build_family("Llama", vocab_size=TOKENS, intermediate_size=64, tie_word_embeddings=tied)
    write_gguf(tmp_path / "model.gguf", model, kind=block)
    plain = load_model(str(tmp_path / "model.gguf"), dtype).model
    kept = load_model(str(tmp_path / "model.gguf"), dtype, quantize=Quantize.AS_STORED).model
    named = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}.get(block, f"GGUF {block}")
    weights = frozen_weights(kept)
    assert {w.stored.format for w in weights.values() if w.dim() == 2} == {named}
    assert fingerprint(kept) == fingerprint(plain)
    assert same_bits(logits_of(kept), logits_of(plain))
    bytes_of = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "F16": 64, "BF16": 64, "F32": 128}
    weight: Any = weights["model.layers.0.self_attn.q_proj.weight"]
    assert weight.stored.nbytes == weight.numel() // 32 * bytes_of[block]
    opt = SparseZO(kept, SparseMask.random(kept, 0.02, 1, frozen=True), lr=1e-3, frozen=True)
    assert torch.isfinite(opt.step(lambda: language_model_loss(kept, IDS)))


@pytest.mark.parametrize("kind", list(QUANTIZERS))
def test_a_missing_package_is_an_error_that_says_what_to_do(
    kind: Quantize, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bitsandbytes.functional", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs the package {PACKAGES[kind]} .*pip install"):
        load_model(checkpoint, quantize=kind)
    load_model(checkpoint, quantize=Quantize.AS_STORED)


class OneTable(nn.Module):
    """A model without linear layers."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)

    get_output_embeddings: Callable[[Any], None] = staticmethod(lambda: None)  # type: ignore[assignment]

    def get_input_embeddings(self) -> nn.Module:
        return self.table


def test_a_model_without_linear_layers_cannot_be_quantized() -> None:
    with pytest.raises(ConfigError, match="OneTable has no linear layers that could be quantized; leave --quantize"):
        freeze_base(OneTable(), Quantize.NF4, torch.float32, CPU)


def test_a_model_without_values_can_be_kept_for_its_shapes() -> None:
    with torch.device("meta"):
        model = build_family("Llama")
    freeze_base(model, Quantize.AS_STORED, torch.float32, torch.device("meta"))
    mask = SparseMask.random(model, 0.1, 1, frozen=True)
    assert mask.digest == SparseMask.random(build_family("Llama"), 0.1, 1).digest
