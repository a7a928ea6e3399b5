"""Left padding: architectures whose scores it changes are refused, all others are not."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from meerkat_engine.engine.errors import ModelError
from meerkat_engine.engine.lm.models import load_model
from meerkat_engine.engine.lm.padding_probe import check_padding

from helpers.constants import DTYPES
from helpers.models import make_model, make_tokenizer
from helpers.tensors import same_bits

IDS = [1, 5, 17, 33, 80, 22, 9, 41, 60, 7, 13, 55]
_COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Ways to keep positions (rotary, learned, sinusoidal, biases), to attend (sliding windows, soft caps), to route to
# experts, and to carry a state from token to token.
UNCHANGED: dict[str, dict[str, Any]] = {
    "bloom": {}, "biogpt": {}, "falcon": {}, "falcon_mamba": {}, "gemma2": {"head_dim": 8}, "gpt2": {},
    "gpt_bigcode": {}, "gpt_neox": {}, "jamba": {}, "lfm2": {}, "llama": {}, "mamba": {}, "mixtral": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "phi": {}, "qwen2": {}, "qwen3_5_text": {}, "xglm": {},
}  # fmt: skip
# A recurrence that reads the padding, one without a mask, and positions that are counted from the first padding token.
CHANGED: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "head_dim": 8},
    "rwkv": {},
    "mbart": {"decoder_layers": 2, "d_model": 32, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
}


def build(architecture: str, settings: dict[str, Any]) -> nn.Module:
    """A tiny model with random weights, larger than at initialization, and a padding token of its own."""
    kind = transformers.AutoConfig.for_model(architecture, **(_COMMON | settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(kind)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(3)
        model.get_input_embeddings().weight.data[0].normal_()
    return model.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", UNCHANGED)
def test_architectures_that_mask_padding_pass(architecture: str, dtype: torch.dtype) -> None:
    check_padding(build(architecture, UNCHANGED[architecture]).to(dtype), IDS, 0, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", CHANGED)
def test_architectures_that_read_padding_are_refused(architecture: str, dtype: torch.dtype) -> None:
    model = build(architecture, CHANGED[architecture]).to(dtype)
    with pytest.raises(ModelError, match=f"left padding changes the scores of {type(model).__name__}: .* use a model "):
        check_padding(model, IDS, 0, dtype)


def test_padding_that_is_zero_is_not_the_only_one_tried() -> None:
    """A new embedding is zero at the padding token, which hides that a recurrence reads it."""
    model = build("recurrent_gemma", CHANGED["recurrent_gemma"])
    model.get_input_embeddings().weight.data[0] = 0  # type: ignore[operator]
    with pytest.raises(ModelError, match="with another padding token they move by"):
        check_padding(model, IDS, 0, torch.float32)


def test_the_probe_does_not_change_the_model() -> None:
    model = make_model()
    before = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    model.requires_grad_(True)
    check_padding(model, IDS, 0, torch.float32)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.training


def test_models_are_probed_when_they_are_loaded(tmp_path: Path) -> None:
    build("recurrent_gemma", CHANGED["recurrent_gemma"]).save_pretrained(tmp_path)  # type: ignore[operator]
    make_tokenizer("The film was long, but its story").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot load the model .* left padding changes the scores of RecurrentGemma"):
        load_model(str(tmp_path))
