"""Tiny random models, and tokenizers with one token per word or byte."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, {"head_dim": 8}),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, {}),  # absolute positions, passed by the caller
    "opt": (transformers.OPTForCausalLM, transformers.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def make_model(
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocabulary: int = 96,
    positions: int = 64,
) -> nn.Module:
    """Builds a tiny causal language model with random weights.

    Args:
        architecture: a key of ``ARCHITECTURES``.
        dtype: dtype of parameters and buffers.
        seed: seed of the weights.
        vocabulary: number of tokens.
        positions: maximum sequence length.
    """
    kind, config, extra = ARCHITECTURES[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config(**(COMMON | extra | {"vocab_size": vocabulary, "max_position_embeddings": positions})))
    # transformers sets biases and norm weights to constants; other values make sure that tests depend on all parameters
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.data += 0.01 * torch.arange(p.numel()).remainder(7) * (1 if "bias" in name else 0.1)
    return model.to(dtype).eval()


def make_tokenizer(words: str) -> transformers.PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per word of ``words``, which are separated by spaces."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(words.split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def make_byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per byte."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
