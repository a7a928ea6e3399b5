"""Tiny GGUF files in llama.cpp's layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from helpers.models import make_byte_tokenizer

_RENAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
    "lm_head": "output",
}  # fmt: skip


def write_gguf(
    path: Path,
    model: nn.Module,
    settings: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    kind: str = "F32",
) -> None:
    """Writes a Llama model to a GGUF file, with a byte-level tokenizer.

    Args:
        path: path of the file.
        model: the model, with a vocabulary of at least 260.
        settings: further settings; a string, float, int, bool or list of ints each.
        tensors: further tensors, float32.
        kind: type of the matrices: "F32", "Q4_0"; vectors are float32.
    """
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    writer = gguf.GGUFWriter(path, "llama")
    config: Any = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool,
           list: writer.add_array}  # fmt: skip
    for name, value in (settings or {}).items():
        add[type(value)](name, value)
    for name, parameter in model.named_parameters():
        converted, values = _converted(name, parameter.detach().numpy(), config)
        number = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(converted, gguf.quants.quantize(values, number), raw_dtype=number)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, size: int) -> None:
    tokens = make_byte_tokenizer().get_vocab()
    names = sorted(tokens, key=lambda token: int(tokens[token]))
    names += ["ab", *(f"<unused{i}>" for i in range(size - len(names) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _converted(name: str, value: np.ndarray, config: Any) -> tuple[str, np.ndarray]:
    """Name and values of a parameter as llama.cpp's converter stores them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for projection, n in heads.items():
        if projection in name:  # llama.cpp interleaves the two halves that rotary embedding pairs
            value = value.reshape(n, 2, value.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(value.shape)
    for old, new in _RENAMES.items():
        name = name.replace(old, new)
    return name, np.ascontiguousarray(value)
