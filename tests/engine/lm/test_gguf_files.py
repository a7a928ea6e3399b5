"""Loading GGUF files: what they hold is in the model, or the file is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine.errors import ModelError
from meerkat_engine.engine.lm.checkpoint import save_checkpoint
from meerkat_engine.engine.lm.models import load_model
from meerkat_engine.engine.lm.text_loss import language_model_loss

from helpers.gguf import write_gguf
from helpers.models import make_model
from helpers.tensors import same_bits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*GGUF.*:UserWarning:transformers")


def test_gguf_model_is_loaded_trained_and_saved(tmp_path: Path) -> None:
    original = make_model("llama", vocabulary=300)
    write_gguf(tmp_path / "model.gguf", original)
    lm = load_model(str(tmp_path / "model.gguf"))
    ids = torch.arange(3, 43).view(2, 20)
    torch.testing.assert_close(lm.model(input_ids=ids).logits, original(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    opt = SparseZO(lm.model, SparseMask.random(lm.model, 0.1, 0), lr=1e-3)
    assert torch.isfinite(opt.step(lambda: language_model_loss(lm.model, ids)))
    save_checkpoint(lm, tmp_path / "out", "# a card")
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(same_bits(a, b) for a, b in zip(plain.parameters(), lm.model.parameters(), strict=True))
    half = load_model(str(tmp_path / "model.gguf"), torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "settings",
    [
        {"llama.rope.freq_base": 10000.0, "llama.rope.dimension_count": 8},
        {"llama.attention.key_length": 8, "llama.attention.value_length": 8},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.finetuned": False},
        {"llama.rope.scaling.original_context_length": 64},
        {"llama.attention.causal": True, "llama.expert_count": 0, "llama.attention.sliding_window": 0},
        {"general.name": "tiny", "general.quantization_version": 2, "somebody.note": "theirs", "general.type": "model"},
        {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.padding_token_id": 0},
    ],
)
def test_settings_that_the_model_has_are_accepted(tmp_path: Path, settings: dict[str, Any]) -> None:
    original = make_model("llama", vocabulary=300)
    write_gguf(tmp_path / "model.gguf", original, settings, {"rope_freqs.weight": np.ones(4, np.float32)})
    model = load_model(str(tmp_path / "model.gguf")).model
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}, r"'llama\.rope\.scaling\.type'"),
        ({"llama.rope.scaling.factor": 8.0}, r"does not read its setting 'llama\.rope\.scaling\.factor'"),
        ({"llama.rope.scaling.original_context_length": 8}, r"'llama\.rope\.scaling\.original_context_length'"),
        ({"llama.rope.dimension_count": 4}, r"8 stored tensors have another shape than in the model, among .*k_proj"),
        ({"llama.attention.key_length": 16}, r"'llama\.attention\.key_length' is 16, and transformers reads 8"),
        ({"llama.attention.sliding_window": 16}, r"does not read its setting 'llama\.attention\.sliding_window' = 16"),
        ({"llama.logit_scale": 0.5}, r"does not read its setting 'llama\.logit_scale' = 0\.5"),
        ({"llama.expert_used_count": 2}, r"does not read its setting 'llama\.expert_used_count' = 2"),
        ({"general.type": "adapter"}, "it holds no model but a 'adapter'"),
    ],
)
def test_settings_that_transformers_does_not_read_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    write_gguf(tmp_path / "model.gguf", make_model("llama", vocabulary=300), settings)
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"rope_freqs.weight": np.array([1, 1, 4, 8], np.float32)}, r"rotary frequencies are scaled \('rope_freqs"),
        ({"rope_factors_long.weight": np.array([1, 1, 4, 8], np.float32)}, "rotary frequencies are scaled"),
        ({"blk.0.attn_q.bias": np.ones(32, np.float32)}, r"not use all tensors, among them 'blk\.0\.attn_q\.bias'"),
        ({"blk.2.attn_norm.weight": np.ones(32, np.float32)}, r"not use all tensors, among them 'blk\.2\.attn_norm"),
    ],
)
def test_tensors_that_the_model_does_not_use_are_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], message: str
) -> None:
    write_gguf(tmp_path / "model.gguf", make_model("llama", vocabulary=300), tensors=tensors)
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path / "model.gguf"))


def test_an_output_layer_of_its_own_is_used(tmp_path: Path) -> None:
    """Whether the embedding is the output layer follows from the tensors."""
    output = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
    write_gguf(tmp_path / "model.gguf", make_model("llama", vocabulary=300), tensors={"output.weight": output})
    model: Any = load_model(str(tmp_path / "model.gguf")).model
    assert same_bits(model.lm_head.weight.detach(), torch.from_numpy(output))


def test_other_rules_for_splitting_text_are_told(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", make_model("llama", vocabulary=300), {"tokenizer.ggml.pre": "deepseek-llm"})
    with pytest.warns(UserWarning, match="splits text by the rules 'deepseek-llm', and transformers by GPT-2's"):
        load_model(str(tmp_path / "model.gguf"))


def test_a_token_that_transformers_adds_is_removed(tmp_path: Path) -> None:
    """It would be beyond the embedding."""
    write_gguf(tmp_path / "model.gguf", make_model("llama", vocabulary=300))
    lm = load_model(str(tmp_path / "model.gguf"))
    assert len(lm.tokenizer) == 300
    ids = lm.tokenizer("ab<|endoftext|>")["input_ids"]
    assert lm.tokenizer.decode(ids) == "ab<|endoftext|>"
    assert max(ids) < 300
    assert lm.tokenizer("ab")["input_ids"] == [259]
