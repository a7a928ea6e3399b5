"""Models with frozen weights, and the plain models whose bits they must have."""

import copy
from typing import Any

import torch
import transformers
from torch import nn

from meerkat_engine import SparseMask
from meerkat_engine.engine.frozen.freeze import freeze
from meerkat_engine.engine.parameters import ParameterTable, floating_parameters

from helpers.models import COMMON

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Qwen2 tied": {"tie_word_embeddings": True},
    "GPT2": {},
    "GPT2 untied": {"tie_word_embeddings": False},
    "Gemma2": {"head_dim": 8},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "Phi3": {},
    "GPTNeoX": {},
    "Falcon": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": _MOE,
    "Mamba": {"state_size": 4},
}
IDS = torch.arange(36).view(3, 12) * 7 % 87 + 3


def build_family(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """Builds a tiny model of a family, with random weights large enough that each one matters.

    Args:
        name: a key of ``FAMILIES``.
        dtype: dtype of the weights.
        **settings: further settings of its config.
    """
    family = name.split()[0]
    config = getattr(transformers, f"{family}Config")(**(COMMON | FAMILIES[name] | settings))
    kind = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = kind(config).eval()
        for p in model.parameters():
            p.data = p.data + 0.1 * torch.randn_like(p) if p.dim() == 1 else 3 * p.data
    return model.to(dtype)


def frozen_copy(model: nn.Module) -> nn.Module:
    """Makes a copy of a model with frozen weights."""
    made = copy.deepcopy(model)
    freeze(made)
    return made


def corners_mask(model: nn.Module) -> SparseMask:
    """Masks the first and the last element of each parameter, several of some rows, and some at random."""
    generator, ids, base = torch.Generator().manual_seed(1), [], 0
    for i, (_, p) in enumerate(floating_parameters(model)):
        size, columns = p.numel(), p.shape[-1]
        of_one = torch.randint(size, (1 + size // 40,), generator=generator)
        row = columns * (i % (size // columns)) + torch.arange(0, columns, 3)
        ids.append(base + torch.cat([torch.tensor([0, size - 1]), of_one, row]))
        base += size
    chosen = torch.cat(ids).unique()
    return SparseMask(ids=chosen, table=ParameterTable.of(model), density=len(chosen) / base, source="corners")
