"""Checkpoints that bitsandbytes or torchao has quantized stay packed, and compute what the dequantized model does."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.engine.errors import ConfigError, ModelError
from meerkat_engine.engine.frozen.weight import FrozenWeight
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.models import load_model
from meerkat_engine.engine.lm.own_dtype import own_dtype
from meerkat_engine.engine.lm.quantize import Quantize
from meerkat_engine.engine.lm.text_loss import language_model_loss
from meerkat_engine.engine.parameters import ParameterTable, fingerprint

from helpers.command import call, summary_of
from helpers.examples import EXAMPLES
from helpers.frozen import IDS, build_family
from helpers.models import make_byte_tokenizer
from helpers.tensors import same_bits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LAYER = "model.layers.1.mlp.up_proj"
Weights = dict[str, Tensor]


def torchao_config(name: str, **settings: bool) -> TorchAoConfig:
    return TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), name)(), **settings)


# Name -> format of the frozen weights, and the config of transformers that packs them.
PACKINGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "nf4": ("nf4", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "nf4, double": (
        "nf4",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "nf4 in bfloat16": (
        "nf4",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16),
    ),
    "fp4": ("fp4", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "int8": ("int8", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao int8": ("torchao Int8Tensor", lambda: torchao_config("Int8WeightOnlyConfig")),
    "torchao float8": ("torchao Float8Tensor", lambda: torchao_config("Float8WeightOnlyConfig")),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Quantizes a model with transformers and returns its directory, beside that of the model: "base"."""

    @cache
    def quantize(packing: str, source: str = "Llama") -> Path:
        package = packing.split()[0] if packing.startswith("torchao") else "bitsandbytes"
        pytest.importorskip(
            package, reason=f"needs {package}: the extra {'quantize' if package[0] == 'b' else package}"
        )
        base = tmp_path_factory.mktemp("packed") / "base"
        if source == embedded.NAME:
            shutil.copytree(embedded.DIRECTORY, base)
        else:
            made: Any = build_family(source, torch.bfloat16, vocab_size=300, intermediate_size=64)
            made.save_pretrained(base)
            make_byte_tokenizer().save_pretrained(base)
        saved = shutil.copytree(base, base.with_name("packed"))
        config = PACKINGS[packing][1]()
        AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
        ).save_pretrained(saved)
        return saved

    return quantize


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(str(path), dtype, quantize=Quantize.AS_STORED).model


def refused(path: Path, message: str, quantize: Quantize = Quantize.AS_STORED) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(path), quantize=quantize)


def change(path: Path, changed: Callable[[Weights], object], metadata: Callable[[dict[str, str]], object] = id) -> None:
    """Changes the tensors of a checkpoint, and the metadata that torchao keeps beside them."""
    file = path / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        kept = tensors.metadata()
    metadata(kept)
    weights = load_file(file)
    changed(weights)
    save_file(weights, file, kept)


@pytest.fixture
def copied(packed: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    return lambda *which: shutil.copytree(packed(*which), tmp_path / "copied")


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def dequantized(weight: Any, dtype: torch.dtype) -> Tensor:
    """The dense weight of a layer that transformers has loaded, by the functions of its library."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        functions = importlib.import_module("bitsandbytes.functional")
        state.dtype = dtype
        return functions.dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]
    if (scales := getattr(weight, "SCB", None)) is not None:
        functions = importlib.import_module("bitsandbytes.functional")
        return functions.int8_vectorwise_dequant(weight.data, scales).to(dtype)  # type: ignore[no-any-return]
    is_plain = type(weight.detach()) is Tensor
    return (weight.detach() if is_plain else weight.dequantize()).to(dtype)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen2 tied"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_checkpoint_computes_what_the_dequantized_model_does(
    packing: str, family: str, dtype: torch.dtype, packed: Callable[..., Path]
) -> None:
    path = packed(packing, family)
    model = load(path, dtype)
    plain = load_model(str(path.with_name("base")), dtype).model
    assert ParameterTable.of(model) == ParameterTable.of(plain)
    theirs = dict(AutoModelForCausalLM.from_pretrained(path, device_map={"": "cpu"}).named_parameters())
    linear = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    linear -= {"lm_head.weight"}
    assert len(linear) == 14
    for (name, own), (_, weight) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert isinstance(own, FrozenWeight)
        assert own.stored.format == (PACKINGS[packing][0] if name in linear else "bfloat16")
        assert own.shape == weight.shape
        weight.data = dequantized(theirs[name], dtype)
    assert str(model) == str(plain)
    assert vars(model).keys() <= {*vars(plain), "is_quantized"}
    assert not model.is_quantized
    assert same_bits(logits_of(model), logits_of(plain))
    assert fingerprint(model) == fingerprint(plain)


def test_the_output_head_can_be_packed_too(packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = lambda: torchao_config("Int8WeightOnlyConfig", include_input_output_embeddings=True)  # noqa: E731
    monkeypatch.setitem(PACKINGS, "torchao all", ("torchao Int8Tensor", config))
    path = packed("torchao all")
    model, plain = load(path), load_model(str(path.with_name("base"))).model
    theirs = dict(AutoModelForCausalLM.from_pretrained(path, device_map={"": "cpu"}).named_parameters())
    for (name, own), (_, weight) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert own.stored.format == ("bfloat16" if "norm" in name or "embed" in name else "torchao Int8Tensor")
        weight.data = dequantized(theirs[name], torch.float32)
    assert same_bits(logits_of(model), logits_of(plain))


@pytest.mark.parametrize("packing", ["nf4, double", "int8", "torchao int8"])
def test_weights_take_the_bytes_of_the_checkpoint(packing: str, packed: Callable[..., Path]) -> None:
    path = packed(packing)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if ".quant_state." not in name and "weight_format" not in name]  # noqa: SIM118
        in_file = sum(file.get_tensor(name).nbytes for name in names)
    kept = sum(p.stored.nbytes for p in load(path).parameters())
    assert kept == in_file


@pytest.mark.parametrize("packing", PACKINGS)
def test_plain_weights_beside_packed_ones_are_not_rounded(packing: str, copied: Callable[..., Path]) -> None:
    path = copied(packing)
    value = torch.linspace(0.9, 1.1, 32)
    change(path, lambda weights: weights.update({"model.norm.weight": value}))
    model = load(path)
    assert same_bits(model.model.norm.weight.dense(), value)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        embedding = file.get_tensor("model.embed_tokens.weight")
    assert same_bits(model.model.embed_tokens.weight.dense(), embedding.float())


@pytest.mark.parametrize("packing", ["nf4", "torchao int8"])
def test_buffers_are_those_of_the_dtype_of_the_run(packing: str, copied: Callable[..., Path]) -> None:
    """A float32 tensor among bfloat16 ones makes transformers read in float32, and Gemma scale embeddings in it."""
    path = copied(packing, "Gemma2")
    plain = load_model(str(path), torch.bfloat16, quantize=Quantize.AS_STORED).model
    change(path, lambda weights: weights.update({"model.norm.weight": torch.linspace(0.9, 1.1, 32)}))
    model = load(path, torch.bfloat16)
    buffers = zip(model.named_buffers(), plain.named_buffers(), strict=True)
    assert all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in buffers)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_checkpoint_has_the_dtype_of_its_plain_weights(packing: str, copied: Callable[..., Path]) -> None:
    path = copied(packing)
    change(path, lambda weights: weights.update({f"{LAYER}.SCB": torch.ones(10**6)}))
    for packs_most in (torch.int8, torch.float8_e4m3fn):
        change(path, lambda weights, dtype=packs_most: weights.update(most=torch.zeros(10**6).to(dtype)))  # type: ignore[misc]
        assert own_dtype(str(path)) == "bfloat16"


@pytest.mark.parametrize("packing", ["nf4, double", "int8", "torchao int8"])
def test_steps_replay_onto_the_checkpoint_with_a_mask_of_the_plain_model(
    packing: str, packed: Callable[..., Path]
) -> None:
    path = packed(packing)
    plain = load_model(str(path.with_name("base"))).model
    mask = SparseMask.random(plain, 0.05, 3, frozen=True)
    model = load(path)
    opt = SparseZO(model, mask, lr=0.02, eps=1e-2, seed=3, frozen=True)
    losses = [opt.step(lambda: language_model_loss(model, IDS)).item() for _ in range(3)]
    assert losses[2] < losses[0]
    again = load(path)
    assert fingerprint(again) != fingerprint(model)
    replay(again, mask, opt.log)
    assert fingerprint(again) == fingerprint(model)
    assert mask.digest == SparseMask.random(again, 0.05, 3, frozen=True).digest


@pytest.mark.parametrize("packing", ["nf4, double", "int8", "torchao int8"])
def test_a_run_replays_to_the_same_bits_and_is_saved_as_a_plain_model(
    packing: str, packed: Callable[..., Path], tmp_path: Path
) -> None:
    result = call("run", "--model", packed(packing, embedded.NAME), "--quantize", "as-stored", "--rounds", 2,
                  "--local-steps", 2, "--clients", 2, "--data", EXAMPLES / "data" / "remarks.jsonl", "--method",
                  "random-mask", "--eval-examples", 20, "--output", tmp_path / "run")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the same bits" in call("replay", tmp_path / "run").output
    result = call("replay", tmp_path / "run", "--output", tmp_path / "trained")
    assert result.exit_code == 0, result.output
    assert "quantization_config" not in json.loads((tmp_path / "trained" / "config.json").read_text())
    assert fingerprint(load_model(str(tmp_path / "trained")).model) == summary_of(tmp_path / "run")["weights"]


def pop(*parts: str) -> Callable[[Weights], object]:
    """Removes tensors of one layer."""
    return lambda weights: [weights.pop(f"{LAYER}.{part}") for part in parts]


def put(change_one: Callable[[Tensor], Tensor], part: str, new: str = "") -> Callable[[Weights], object]:
    """Changes a tensor of one layer, or puts the changed one beside it."""
    return lambda weights: weights.update({f"{LAYER}.{new or part}": change_one(weights[f"{LAYER}.{part}"])})


def both(*changes: Callable[[Weights], object]) -> Callable[[Weights], object]:
    return lambda weights: [one(weights) for one in changes]


STATE = "weight.quant_state.bitsandbytes__nf4"
OF_NF4 = ("weight.absmax", "weight.quant_map", STATE)
LACKS = rf"its packed layer '{LAYER}' lacks the tensor '"
CANNOT = (
    r"transformers cannot read its weights packed by {} \(.*\): a tensor may be missing, be damaged, or belong to no"
)
UNUSED = "does not use 1 of the tensors in its weights, among them '"
DAMAGES: dict[str, tuple[str, Callable[[Weights], object], str]] = {
    "no weight": ("nf4", pop("weight"), LACKS + "weight'"),
    "no absmax": ("nf4", pop("weight.absmax"), LACKS + "weight.absmax'"),
    "no map": ("nf4", pop("weight.quant_map"), LACKS + "weight.quant_map'"),
    "no state": ("nf4", pop(STATE), LACKS + "weight.quant_state'"),
    "no nested absmax": ("nf4, double", pop("weight.nested_absmax"), LACKS + "weight.nested_absmax'"),
    "no nested map": ("nf4, double", pop("weight.nested_quant_map"), LACKS + "weight.nested_quant_map'"),
    "nothing nested": (
        "nf4, double",
        pop("weight.nested_absmax", "weight.nested_quant_map"),
        "hold scales that do not belong to its packed weights; save the quantized model again",
    ),
    "no scales": ("nf4", pop(*OF_NF4), f"config says that the layer '{LAYER}' is quantized, and its files hold no sca"),
    "no layer": ("nf4", pop("weight", *OF_NF4), CANNOT.format("bitsandbytes")),
    "plain layer": (
        "nf4",
        both(pop(*OF_NF4), put(lambda _: torch.ones(64, 32), "weight")),
        "its files hold no scales for it",
    ),
    "short weight": ("nf4", put(lambda w: w[:100].clone(), "weight"), "scales that do not belong to its packed"),
    "rounded absmax": ("nf4", put(Tensor.bfloat16, "weight.absmax"), "scales that do not belong to its packed weights"),
    "extra state": ("nf4", put(Tensor.clone, "weight.absmax", "weight.other"), UNUSED + f"{LAYER}.weight.other'"),
    "extra layer": ("nf4", put(Tensor.clone, "weight", "lora.weight"), UNUSED + f"{LAYER}.lora.weight'"),
    "scales of no layer": (
        "nf4",
        lambda weights: weights.update({"model.norm.weight.absmax": torch.ones(1)}),
        "its packed layer 'model.norm' lacks the tensor 'weight.quant_map'",
    ),
    "int8 without weight": ("int8", pop("weight"), LACKS + "weight'"),
    "int8 without scales": ("int8", pop("SCB"), LACKS + "SCB'"),
    "int8 without format": ("int8", pop("weight_format"), f"lack 1 of their packed tensors, among them '{LAYER}.wei"),
    "int8 in tiles": (
        "int8",
        put(lambda _: torch.tensor(1, dtype=torch.uint8), "weight_format"),
        rf"its packed tensor '{LAYER}.weight_format' \(U8 \[\] in model.safetensors\) was read as other values",
    ),
    "int8 with few scales": ("int8", put(lambda s: s[:3].clone(), "SCB"), "scales that do not belong to its packed"),
    "int8 with rounded scales": ("int8", put(Tensor.bfloat16, "SCB"), "scales that do not belong to its packed"),
    "torchao without scale": ("torchao int8", pop("_weight_scale"), CANNOT.format("torchao")),
    "torchao without values": ("torchao int8", pop("_weight_qdata"), CANNOT.format("torchao")),
    "torchao without layer": (
        "torchao int8",
        pop("_weight_qdata", "_weight_scale", "_weight_zero_point"),
        f"its weights lack 1 of the model's tensors, among them '{LAYER}.weight'",
    ),
    "torchao with more": ("torchao int8", put(Tensor.clone, "_weight_scale", "_weight_x"), UNUSED + f"{LAYER}._weight"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_incomplete_checkpoints_are_refused(damage: str, copied: Callable[..., Path]) -> None:
    packing, changed, message = DAMAGES[damage]
    path = copied(packing)
    load(path)
    change(path, changed)
    refused(path, message)


def test_torchao_checkpoints_without_their_metadata_are_refused(copied: Callable[..., Path]) -> None:
    path = copied("torchao int8")
    change(path, lambda _: None, lambda metadata: metadata.pop("tensor_names"))
    refused(path, "Invalid torchao safetensors metadata")


def test_tensors_that_were_read_as_other_values_are_refused(
    packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As versions of transformers may read them that cast every floating-point tensor to the dtype of the model."""
    path, read = packed("nf4, double"), AutoModelForCausalLM.from_pretrained

    def rounding(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["device_map"] == {"": "cpu"}  # without it, transformers reads onto a GPU
        model, info = read(*args, **kwargs)
        state = model.get_submodule(LAYER).weight.quant_state.state2
        state.absmax = state.absmax.bfloat16().float()
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", rounding)
    refused(path, rf"its packed tensor '{LAYER}.weight.nested_absmax' \(F32 \[1\] in model.safetensors\) was read as")


@pytest.mark.parametrize("quantize", [kind for kind in Quantize if kind is not Quantize.AS_STORED])
def test_packed_checkpoints_are_kept_only_as_they_are_stored(quantize: Quantize, packed: Callable[..., Path]) -> None:
    message = (
        r"its weights are packed \(quantization_config in its config, method bitsandbytes\); keep them as they are "
        r"with --quantize as-stored \(Quantize.AS_STORED\), or load the checkpoint that it was quantized from"
    )
    refused(packed("nf4"), message, quantize)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "hqq"])
def test_other_formats_are_refused(method: str, copied: Callable[..., Path]) -> None:
    path = copied("nf4")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (path / "config.json").write_text(json.dumps(config))
    message = (
        rf"method {method}\), which only weights of bitsandbytes and torchao can stay, with --quantize as-stored; load "
        r"the checkpoint that it was quantized from, or dequantize it and save the result"
    )
    refused(path, message)


@pytest.mark.parametrize("name", ["compression_config", "text_config"])
def test_formats_of_a_part_of_the_model_are_refused(name: str, copied: Callable[..., Path]) -> None:
    path = copied("nf4")
    config = json.loads((path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    config[name] = quantization if name != "text_config" else {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    refused(path, "its weights are packed .* method bitsandbytes.*, which only weights of")


def test_layers_that_are_stored_transposed_are_refused(packed: Callable[..., Path]) -> None:
    refused(
        packed("nf4", "GPT2"), r"layer 'transformer.h.0.attn.c_attn' is stored transposed \(\[96, 32\] instead of \["
    )


def test_torchao_tensors_that_quantize_their_inputs_are_refused(
    packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = ("", lambda: torchao_config("Int8DynamicActivationInt8WeightConfig"))
    monkeypatch.setitem(PACKINGS, "torchao inputs", inputs)
    refused(
        packed("torchao inputs"), "is for layers that quantize their inputs too, which is not supported; quantize the"
    )


@pytest.mark.parametrize(
    ("packing", "package", "extra"),
    [("nf4", "bitsandbytes", "quantize"), ("int8", "accelerate", "quantize"), ("torchao int8", "torchao", "torchao")],
)
def test_a_missing_package_is_named_with_its_extra(
    packing: str, package: str, extra: str, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed(packing)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"need the package {package} \(.*pip install .*'\.\[{extra}\]'"):
        load(path)


def test_pickles_stay_refused(copied: Callable[..., Path]) -> None:
    path = copied("nf4")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    refused(path, r"its weights are a pickle \(pytorch_model.bin\)")
