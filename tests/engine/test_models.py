"""Loading models: directories, GGUF files, and what cannot be loaded."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.errors import ModelError
from meerkat_engine.models import load_model, prepare
from meerkat_engine.objective import language_model_loss
from tests.conftest import make_byte_tokenizer, make_model, make_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_directory_gives_model_and_tokenizer(tmp_path: Path, llama: nn.Module, dtype: torch.dtype) -> None:
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    make_tokenizer("a b").save_pretrained(tmp_path)
    lm = load_model(str(tmp_path), dtype)
    assert {p.dtype for p in lm.model.parameters()} == {dtype}
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert lm.tokenizer.padding_side == "left"
    for a, b in zip(lm.model.parameters(), llama.parameters(), strict=True):
        assert torch.equal(a, b.to(dtype))


def write_gguf(path: Path, model: nn.Module) -> None:
    """A Llama model as a GGUF file with float32 tensors and a byte-level tokenizer, as llama.cpp lays them out."""
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)  # type: ignore[union-attr]
    writer.add_embedding_length(config.hidden_size)  # type: ignore[union-attr]
    writer.add_block_count(config.num_hidden_layers)  # type: ignore[union-attr]
    writer.add_feed_forward_length(config.intermediate_size)  # type: ignore[union-attr]
    writer.add_head_count(config.num_attention_heads)  # type: ignore[union-attr]
    writer.add_head_count_kv(config.num_key_value_heads)  # type: ignore[union-attr]
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)  # type: ignore[union-attr]
    writer.add_vocab_size(config.vocab_size)  # type: ignore[union-attr]
    tokens = make_byte_tokenizer().get_vocab()
    names = sorted(tokens, key=lambda token: int(tokens[token]))
    names += ["ab", *(f"<unused{i}>" for i in range(config.vocab_size - len(names) - 1))]  # type: ignore[union-attr]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    renames = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
    }  # fmt: skip
    for name, p in model.named_parameters():
        value = p.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}  # type: ignore[union-attr]
        for projection, n in heads.items():
            if projection in name:  # llama.cpp interleaves the halves that rotary embedding pairs
                value = value.reshape(n, 2, value.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(value.shape)
        for old, new in renames.items():
            name = name.replace(old, new)
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_gguf_file_gives_the_same_model_and_trains(tmp_path: Path) -> None:
    original = make_model("llama", vocabulary=300)
    write_gguf(tmp_path / "model.gguf", original)
    lm = load_model(str(tmp_path / "model.gguf"))
    ids = torch.arange(3, 43).view(2, 20)
    torch.testing.assert_close(lm.model(input_ids=ids).logits, original(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    opt = SparseZO(lm.model, SparseMask.random(lm.model, 0.1, 0), lr=1e-3)
    assert torch.isfinite(opt.step(lambda: language_model_loss(lm.model, ids)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "no/where",
            r"cannot load the model 'no/where' on the Hugging Face hub \(there is no directory 'no/where' here\)",
        ),
        ("nowhere.gguf", r"there is no GGUF file 'nowhere\.gguf'"),
    ],
)
def test_models_that_are_not_there(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(source)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"cannot load the model .* as a directory"):
        load_model(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(os.urandom(100))
    with pytest.raises(ModelError, match=r"cannot load the model .* as a GGUF file"):
        load_model(str(tmp_path / "x.gguf"))


def test_a_tokenizer_without_padding_or_end_is_refused() -> None:
    tokenizer = make_tokenizer("a")
    tokenizer.pad_token = None
    assert prepare(tokenizer).pad_token == "</s>"
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a padding nor an end-of-sequence token"):
        prepare(tokenizer)
