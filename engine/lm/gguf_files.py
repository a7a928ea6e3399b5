"""Checks a model against the GGUF file that it was loaded from: every setting and tensor in the file is in the model.

transformers reads a part of a file's settings and skips tensors that it does not know, such as the scaled rotary
frequencies of Llama 3.1.
"""

import json
import math
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from torch import nn

_REMEDY = "load the model from the safetensors files that it was converted from"
# Attributes of a config that hold a setting of a GGUF file. In GGUF a setting of 0 means that it is not used.
_ATTRIBUTES = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_used_count": ("num_experts_per_tok",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "shortconv.l_cache": ("conv_L_cache",),
}
# Settings that only state shapes. The tensors have these shapes, and transformers compares them with the model's.
_SHAPES = {
    "vocab_size", "embedding_length", "block_count", "feed_forward_length", "expert_count",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "ssm.inner_size", "ssm.group_count",
}  # fmt: skip
# Names of rules by which byte-level tokenizers split text that give the tokens of GPT-2's rules. Those of the second
# line split digits from each other, and have no merges of digits.
_GPT2_SPLITS = {
    "gpt-2", "phi-2", "olmo", "jais", "default",
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
}  # fmt: skip


class GgufFile:
    """Settings and tensors of a GGUF file.

    Args:
        path: path of the file.

    Raises:
        ValueError: if it is not a GGUF file, or damaged.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader  # an extra

        reader = GGUFReader(path)
        self.settings: dict[str, Any] = {name: field.contents() for name, field in _scalars_and_short_arrays(reader)}
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.settings.get("general.architecture"))
        tokens = reader.fields.get("tokenizer.ggml.tokens")
        self._token_count = 0 if tokens is None else len(tokens.data)

    def check_settings(self, config: Any) -> None:
        """Checks that a config has the file's settings, and warns if the tokenizer may split text in another way.

        Args:
            config: the config that transformers made of the file.

        Raises:
            ValueError: if a setting is not in the config, or with another value.
        """
        if (kind := self.settings.get("general.type", "model")) != "model":
            raise ValueError(f"it holds no model but a {kind!r}; give the file of the model itself")
        if factors := [name for name in self.tensors if name.startswith("rope_f") and not self._all_ones(name)]:
            raise ValueError(
                f"its rotary frequencies are scaled ({factors[0]!r}, as in Llama 3.1 and later), which transformers "
                f"does not read from GGUF files, so attention would be wrong; {_REMEDY}"
            )
        prefix = f"{self.architecture}."
        for name, value in self.settings.items():
            if name.startswith(prefix):
                _check_setting(name.removeprefix(prefix), value, self.settings, config, prefix)
        self._check_tokenizer()

    def remove_new_tokens(self, tokenizer: Any) -> None:
        """Removes tokens from a tokenizer that the file does not have; the model does not know them.

        transformers adds GPT-2's end-of-text token to byte-level tokenizers.
        """
        if all(number < self._token_count for number in tokenizer.added_tokens_decoder):
            return
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < self._token_count]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))

    def check_tensors(self, model: nn.Module) -> None:
        """Checks that the model holds every tensor of the file.

        transformers compares shapes, and parameters without a tensor raise. So each parameter has its tensors, and if
        the numbers of elements are equal, no tensor is left.

        Raises:
            ValueError: if it does not.
        """
        entries = model.state_dict(keep_vars=True).values()
        held = sum(entry.numel() for entry in {id(entry): entry for entry in entries}.values())
        tensors = [name for name in self.tensors if not name.startswith("rope_f")]
        stored = sum(math.prod(map(int, self.tensors[name].shape)) for name in tensors)
        if stored == held:
            return
        unknown = sorted(set(tensors) - set(self._known_tensors(model)))
        example = f", among them {unknown[0]!r}" if unknown else ""
        raise ValueError(
            f"its tensors have {stored} elements and {type(model).__name__} as transformers makes it of this file has "
            f"{held}: it does not use all tensors{example}; {_REMEDY}"
        )

    def _known_tensors(self, model: nn.Module) -> Iterator[str]:
        """Names that gguf gives the model's parameters."""
        return filter(None, map(self.tensor_name, model.state_dict()))

    def tensor_name(self, parameter: str) -> str | None:
        """Name that gguf gives a parameter of the model; None if it knows none."""
        return None if self._names is None else self._names.get_name(parameter, (".weight", ".bias"))

    @cached_property
    def _names(self) -> Any:
        import gguf

        kind = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture), None)
        blocks = int(self.settings.get(f"{self.architecture}.block_count", 0))
        return None if kind is None else gguf.get_tensor_name_map(kind, blocks)

    def _all_ones(self, name: str) -> bool:
        return bool((self.tensors[name].data == 1).all())

    def _check_tokenizer(self) -> None:
        """Warns if transformers has no rules for splitting text of the name that the file gives."""
        mapping = getattr(transformers.integrations.gguf, "gguf_tokenizer_mapping", None)
        known = _GPT2_SPLITS | set(getattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS", ()))
        split = self.settings.get("tokenizer.ggml.pre")
        if self.settings.get("tokenizer.ggml.model") == "gpt2" and split is not None and split not in known:
            warnings.warn(
                f"the tokenizer of the GGUF file splits text by the rules {split!r}, and transformers by GPT-2's, so "
                f"some texts get other tokens than with the original tokenizer; {_REMEDY}",
                stacklevel=2,
            )


def _scalars_and_short_arrays(reader: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a file without the tokenizer's lists, which have an entry for each token."""
    return ((name, field) for name, field in reader.fields.items() if len(field.data) <= 1024)


def _check_setting(name: str, value: Any, settings: dict[str, Any], config: Any, prefix: str) -> None:
    """Checks that a config has a setting of the architecture; see ``GgufFile.check_settings``."""
    values = {entry for entry in (value if isinstance(value, list) else [value]) if entry not in (0, "none")}
    if not values or name in _SHAPES or (name == "attention.causal" and values == {True}):
        return
    if name.startswith("rope.scaling."):
        unscaled = settings.get(f"{prefix}rope.scaling.type", "none") == "none"
        same_length = name.endswith("original_context_length") and value == settings.get(f"{prefix}context_length")
        if unscaled and (same_length or name.endswith((".type", ".finetuned"))):
            return
        raise ValueError(f"transformers does not read its setting '{prefix}{name}' from GGUF files; {_REMEDY}")
    found, actual = _value_in_config(name, config)
    if not found and name == "context_length":  # an architecture without a limit
        return
    if not found:
        raise ValueError(
            f"transformers does not read its setting '{prefix}{name}' = {value} from GGUF files; {_REMEDY}"
        )
    if not all(_equal(entry, actual) for entry in values):
        raise ValueError(f"its setting '{prefix}{name}' is {value}, and transformers reads {actual}; {_REMEDY}")


def _value_in_config(name: str, config: Any) -> tuple[bool, Any]:
    """Whether a config has a setting of a GGUF file, and its value there."""
    if name == "rope.freq_base":
        rope = getattr(config, "rope_parameters", None) or {}
        theta = rope.get("rope_theta", getattr(config, "rope_theta", None))
        return theta is not None, theta
    if name == "rope.dimension_count":
        return True, _rotary_width(config)
    for attribute in _ATTRIBUTES.get(name, ()):
        if hasattr(config, attribute):
            actual = getattr(config, attribute)
            if actual is None and attribute == "head_dim":
                actual = config.hidden_size // config.num_attention_heads
            return True, actual
    if name in ("attention.key_length", "attention.value_length"):
        return True, config.hidden_size // config.num_attention_heads
    return False, None


def _rotary_width(config: Any) -> int:
    """Number of a head's dimensions that rotary embedding turns."""
    if getattr(config, "rotary_dim", None):
        return int(config.rotary_dim)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    return int(head * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0))


def _equal(value: Any, actual: Any) -> bool:
    if isinstance(value, float) and isinstance(actual, int | float):
        return math.isclose(value, actual, rel_tol=1e-5)
    return bool(value == actual)


__all__ = ["GgufFile"]
