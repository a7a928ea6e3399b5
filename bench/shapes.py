"""Builds models of published shapes with random weights: the cost of a weight pass depends on the shapes only."""

from collections.abc import Callable
from typing import cast

import torch
import transformers
from torch import nn

from ..engine.lm import embedded

_LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA_3B = {
    "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
_QWEN2_1B5 = {
    "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA2_2B = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
_SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
_OPT_1B3 = {
    "vocab_size": 50272, "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
    "word_embed_proj_dim": 2048,
}  # fmt: skip
_PYTHIA_14M = {
    "vocab_size": 50304, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 4,
}  # fmt: skip
_PYTHIA_31M = {
    "vocab_size": 50304, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 8,
}  # fmt: skip

_CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "pythia-14m": lambda: transformers.GPTNeoXConfig(**_PYTHIA_14M),
    "pythia-31m": lambda: transformers.GPTNeoXConfig(**_PYTHIA_31M),
    "smollm2-135m": lambda: transformers.LlamaConfig(**_SMOLLM2_135M),
    "opt-1.3b": lambda: transformers.OPTConfig(**_OPT_1B3),
    "llama-3.2-1b": lambda: transformers.LlamaConfig(**_LLAMA_1B),
    "llama-3.2-3b": lambda: transformers.LlamaConfig(**_LLAMA_3B),
    "llama-3.1-8b": lambda: transformers.LlamaConfig(**_LLAMA_8B),
    "qwen2-1.5b": lambda: transformers.Qwen2Config(**_QWEN2_1B5),
    "gemma-2-2b": lambda: transformers.Gemma2Config(**_GEMMA2_2B),
}
SHAPES = (embedded.NAME, *_CONFIGS)
# Tokens of 16 prompts of SST-2 ("{sentence} It was", begin of text included) by GPT-2's tokenizer, which OPT uses: the
# batch, of 100 random ones of the training set, whose mean (14.2) and share of padding (2.6 positions a token) are
# nearest to those of all.
SST2_LENGTHS = (8, 12, 8, 36, 6, 24, 5, 11, 5, 30, 15, 11, 14, 16, 9, 16)


def build(name: str, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> nn.Module:
    """Builds a model in evaluation mode.

    Args:
        name: one of ``SHAPES``. The embedded model has its own weights, the others have random ones.
        dtype: dtype of the weights.
        device: device of the weights.
        layers: number of transformer blocks; None: all of them.
    """
    if name == embedded.NAME:
        return embedded.load(dtype, device).model
    config = _CONFIGS[name]()
    if layers is not None:
        config.num_hidden_layers = layers
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval()
    return cast(nn.Module, model)


def parameter_sizes(name: str) -> list[int]:
    """Returns the number of elements of each parameter of a shape."""
    device = torch.device("cpu" if name == embedded.NAME else "meta")
    return [p.numel() for p in build(name, torch.bfloat16, device).parameters()]


__all__ = ["SHAPES", "SST2_LENGTHS", "build", "parameter_sizes"]
