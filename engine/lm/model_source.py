"""Checks of a model's files before any of them is loaded: no pickles, adapters or weights packed in unknown ways."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file, find_adapter_config_file

from .packed import METHODS

PICKLES = (
    "a pickle can contain code, so weights are read from safetensors or GGUF files only; "
    "if you trust the file, convert it to safetensors"
)
_QUANTIZATION = ("quantization_config", "compression_config")


def check_source(source: str, options: dict[str, Any], *, as_stored: bool = False) -> tuple[str | None, str | None]:
    """Checks the files of a model that is not a GGUF file.

    Args:
        source: a local directory or a Hugging Face id.
        options: options for transformers' ``from_pretrained``.
        as_stored: whether packed weights may stay packed; see ``packing``.

    Returns:
        File name of the weights or their index that the config names; None if it names none. And the method by which
        the weights are packed; None if they are plain.

    Raises:
        ValueError: for an adapter, for pickled weights, for packed ones that cannot be kept so, and for weights outside
            the model's directory.
    """
    if find_adapter_config_file(source) is not None:  # its base model can be anywhere, and its weights can be a pickle
        raise ValueError(
            "it is an adapter or contains one; merge the adapter into its base model, save that, and load the result"
        )
    path = Path(source)
    pickles = sorted(file.name for suffix in (".bin", ".pt", ".pth") for file in path.glob(f"*{suffix}"))
    if pickles and not any(path.glob("*.safetensors")):
        raise ValueError(f"its weights are a pickle ({pickles[0]}); {PICKLES}")
    config = AutoConfig.from_pretrained(source, **options)
    method = packing(config, as_stored=as_stored)
    named = getattr(config, "transformers_weights", None)  # has precedence over use_safetensors
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"its config names {named!r} as its weights; {PICKLES}")
    for index in {SAFE_WEIGHTS_INDEX_NAME, str(named)}:
        if index.endswith(".index.json"):
            _check_index(source, index)
    return None if named is None else str(named), method


def packing(config: Any, *, as_stored: bool = False) -> str | None:
    """Returns how a config's weights are packed into fewer bits, with scales beside them; None if they are plain.

    transformers unpacks some of these formats on some devices. Others it leaves packed, with numbers that are no
    weights, and what it unpacks it may save divided by its scale. So weights may be packed only where they stay so.

    Args:
        config: the config.
        as_stored: whether weights that bitsandbytes or torchao has quantized may stay packed (``packed.METHODS``).

    Raises:
        ValueError: if they are packed and cannot stay so.
    """
    kept = None
    for depth, settings in enumerate(_dictionaries(config.to_dict())):
        for name in _QUANTIZATION:
            if packing := settings.get(name):
                method = packing.get("quant_method") if isinstance(packing, dict) else None
                can_stay = method in METHODS and name == "quantization_config" and depth == 0
                if as_stored and can_stay:
                    kept = str(method)
                    continue
                where = f"its weights are packed ({name} in its config{f', method {method}' if method else ''})"
                if can_stay:
                    raise ValueError(
                        f"{where}; keep them as they are with --quantize as-stored (Quantize.AS_STORED), or load the "
                        f"checkpoint that it was quantized from"
                    )
                raise ValueError(
                    f"{where}, which only weights of {' and '.join(METHODS)} can stay, with --quantize as-stored; load "
                    f"the checkpoint that it was quantized from, or dequantize it and save the result"
                )
    return kept


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    """Iterates over a dictionary and those within it, such as the config of a model's text part."""
    if isinstance(value, dict):
        yield value
        for entry in value.values():
            yield from _dictionaries(entry)


def _check_index(source: str, name: str) -> None:
    """Raises ``ValueError`` unless all shards that an index names are safetensors files in the index's directory."""
    index = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return
    shards = map(str, json.loads(Path(index).read_bytes())["weight_map"].values())
    forbidden = sorted({file for file in shards if not file.endswith(".safetensors") or Path(file).name != file})
    if forbidden:
        raise ValueError(
            f"its {name} names {forbidden[0]!r} as weights, which is not a safetensors file in the same directory; "
            f"{PICKLES}"
        )


__all__ = ["PICKLES", "check_source", "packing"]
