"""Models and their safetensors files: what is stored is used, refused or told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from meerkat_engine.engine.errors import ModelError
from meerkat_engine.engine.lm.models import load_model

from helpers.models import make_model, make_tokenizer
from helpers.tensors import same_bits


def save(model: nn.Module, directory: Path) -> Path:
    """Saves a model with a tokenizer."""
    model.save_pretrained(directory)  # type: ignore[operator]
    make_tokenizer("a b").save_pretrained(directory)
    return directory


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def change_config(directory: Path, **settings: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))


def refused(directory: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(directory))


def test_biases_without_a_place_in_the_config_are_refused(tmp_path: Path) -> None:
    config = make_model().config
    config.attention_bias = True  # type: ignore[union-attr]
    save(transformers.LlamaForCausalLM(config), tmp_path)
    load_model(str(tmp_path))
    change_config(tmp_path, attention_bias=False)
    refused(
        tmp_path, r"does not use 8 of the tensors in its weights, among them 'model\.layers\.0\.self_attn\.k_proj\.b"
    )


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    """Its embedding could be the output layer of a language model; its head would be lost."""
    save(transformers.LlamaForSequenceClassification(make_model().config), tmp_path)
    refused(tmp_path, r"does not use 1 of the tensors in its weights, among them 'score\.weight'")


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    save(make_model(), tmp_path)
    change_config(tmp_path, intermediate_size=40)
    refused(tmp_path, r"6 stored tensors have another shape than in the model, among them .*, \(32, 48\) instead of")


def test_an_output_layer_that_differs_from_the_tied_embedding_is_used(tmp_path: Path) -> None:
    """The config ties the two; equal bits are stored twice by some programs."""
    model = make_model()
    save(model, tmp_path)
    embedding = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    change_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": embedding.clone()}))
    loaded: Any = load_model(str(tmp_path)).model
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    change_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": 2 * embedding}))
    loaded = load_model(str(tmp_path)).model
    assert same_bits(loaded.lm_head.weight.detach(), 2 * embedding)
    assert same_bits(loaded.get_input_embeddings().weight.detach(), embedding)


def test_buffers_that_the_model_computes_are_ignored(tmp_path: Path) -> None:
    """Files of older versions of transformers hold them."""
    model = make_model()
    save(model, tmp_path / "llama")
    frequencies = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies.bfloat16()}
    change_weights(tmp_path / "llama", lambda weights: weights.update(stored))
    load_model(str(tmp_path / "llama"))

    save(make_model("gpt2"), tmp_path / "gpt2")
    mask = torch.ones(64, 64, dtype=torch.uint8).tril().view(1, 1, 64, 64)
    stored = {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
              "transformer.position_ids": torch.arange(64).view(1, 64)}  # fmt: skip
    change_weights(tmp_path / "gpt2", lambda weights: weights.update(stored))
    load_model(str(tmp_path / "gpt2"))


def test_tensors_that_an_architecture_lists_as_unused_are_told(tmp_path: Path) -> None:
    save(make_model(), tmp_path / "llama")
    stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_weights(tmp_path / "llama", lambda weights: weights.update(stored))
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM does not use 1 of the tensors in its weights.*inv_freq'"):
        load_model(str(tmp_path / "llama"))

    save(make_model("gpt2"), tmp_path / "gpt2")
    stored = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}  # no causal mask
    change_weights(tmp_path / "gpt2", lambda weights: weights.update(stored))
    with pytest.warns(UserWarning, match=r"GPT2LMHeadModel does not use 1 of the tensors in its weights"):
        load_model(str(tmp_path / "gpt2"))


def test_a_checkpoint_without_its_models_prefix_is_loaded(tmp_path: Path) -> None:
    model = make_model("gpt2")
    save(model, tmp_path)

    def rename(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)

    change_weights(tmp_path, rename)
    loaded = load_model(str(tmp_path)).model
    assert all(same_bits(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    change_weights(tmp_path, lambda weights: weights.update({"h.0.attn.c_proj.scale": torch.ones(1)}))
    refused(tmp_path, r"GPT2LMHeadModel with this config does not use 1 .*'h\.0\.attn\.c_proj\.scale'")


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """transformers merges the experts' tensors of these files into one tensor a layer."""
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, max_position_embeddings=64,
    )  # fmt: skip
    return save(transformers.MixtralForCausalLM(config), tmp_path / "mixtral")


def test_experts_in_tensors_of_their_own_are_loaded(mixtral: Path) -> None:
    assert sum("experts.2." in name for name in load_file(mixtral / "model.safetensors")) == 3
    load_model(str(mixtral))


def test_an_expert_too_many_is_refused(mixtral: Path) -> None:
    weights = load_file(mixtral / "model.safetensors")
    more = {name.replace("experts.2.", "experts.3."): value.clone() for name, value in weights.items()}
    change_weights(mixtral, lambda weights: weights.update(more))
    refused(mixtral, "stored tensors have another shape|do not match")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[operator]
    make_tokenizer("a b").save_pretrained(tmp_path)
    load_model(str(tmp_path))
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    weights = load_file(second)
    name, value = next(iter(load_file(first).items()))
    save_file(weights | {name: value + 1}, second, {"format": "pt"})
    refused(tmp_path, rf"its tensor '{name}' is both in {first.name} and in {second.name}")


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"quantization_config": {}, "text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
    ids=str,
)
def test_packed_checkpoints_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    save(make_model(), tmp_path)
    change_config(tmp_path, **settings)
    method = (settings.get("quantization_config") or {"quant_method": ""})["quant_method"]
    refused(tmp_path, rf"its weights are packed \((quantization|compression)_config in its config, method .*{method}")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn], ids=str)
def test_packed_tensors_without_a_word_in_the_config_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save(make_model(), tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(tmp_path, lambda weights: weights.update({name: (8 * weights[name]).to(dtype)}))
    refused(tmp_path, r"its weights are packed: 'model\.layers\.1\.mlp\.up_proj\.weight' in model\.safetensors is of")


def test_float64_weights_are_cast(tmp_path: Path) -> None:
    model = make_model()
    save(model, tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({name: w.double() for name, w in weights.items()}))
    loaded = load_model(str(tmp_path)).model
    assert all(same_bits(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
