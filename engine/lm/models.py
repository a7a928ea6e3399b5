"""Loading a causal language model and its tokenizer: Hugging Face id, local directory, or GGUF file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file, find_adapter_config_file

from ..errors import ModelError
from ..extras import install_hint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLES = (
    "a pickle may hold code, so weights are read from safetensors or GGUF files only: convert it where you trust it"
)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in evaluation mode and its tokenizer, which pads on the left.

    Args:
        model: the model.
        tokenizer: the model's.
        source: where it came from.
        adapters: names of the parameters that ``lora.add_lora`` put in; empty without adapters.
    """

    model: nn.Module
    tokenizer: Any
    source: str
    adapters: tuple[str, ...] = ()


def load_model(
    source: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Loads a model and its tokenizer, weights from safetensors or GGUF files only.

    Every parameter has the dtype asked for; buffers, such as the frequencies of rotary positions, keep the one that the
    architecture gives them, as in any program that loads the model.

    Args:
        source: a local directory, a ``.gguf`` file, or a Hugging Face model id.
        dtype: of the weights: float32, bfloat16 or float16.
        device: where to put the model.
        trust_remote_code: runs the code that comes with the model, where it comes with some; otherwise such a model is
            refused.

    Raises:
        ModelError: if it cannot be found or loaded, saying what was looked for; has its weights as pickles; is an
            adapter without its model; or needs code of its own that is not trusted.
    """
    device = check_device(device)
    path = Path(source)
    if path.suffix == ".gguf" and not path.is_file():
        raise ModelError(f"there is no GGUF file {source!r}")
    try:
        model, tokenizer = _read(path, source, dtype, trust_remote_code)
    except ImportError as error:
        if path.suffix != ".gguf":
            raise ModelError(f"cannot load the model {source!r}: {error}") from error
        raise ModelError(
            f"GGUF files need the packages gguf and accelerate ({error}); {install_hint('gguf')}"
        ) from error
    except Exception as error:  # of any type: transformers and tokenizers pass on what a damaged file leads to
        looked = (
            "as a directory" if path.is_dir() else "as a GGUF file" if path.suffix == ".gguf" else _on_the_hub(source)
        )
        raise ModelError(f"cannot load the model {source!r} {looked}: {_why(error, trust_remote_code)}") from error
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return LanguageModel(model.to(device).eval().requires_grad_(False), prepare(tokenizer), source)


def _read(path: Path, source: str, dtype: torch.dtype, trust: bool) -> tuple[Any, Any]:
    """The model and its tokenizer as transformers gives them."""
    # told either way: transformers would ask at the terminal
    common: dict[str, Any] = {"trust_remote_code": trust}
    unpacked = {}
    if path.suffix == ".gguf":
        source, common, unpacked = str(path.parent), common | {"gguf_file": path.name}, _unpacked()
    else:
        _check_weights(path, source, common)
    tokenizer = AutoTokenizer.from_pretrained(source, **common)
    model, found = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True, **common, **unpacked
    )
    if missing := sorted(found["missing_keys"]):  # which would be drawn at random
        raise ValueError(f"its weights lack {len(missing)} tensors, {missing[0]!r} among them")
    return model, tokenizer


def _unpacked() -> dict[str, Any]:
    """Has a GGUF file unpacked to a plain model: a packed one computes with kernels from the hub, and is not saved."""
    kind = getattr(transformers, "GgufConfig", None)  # versions that have none always unpack
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _check_weights(path: Path, source: str, common: dict[str, Any]) -> None:
    """Raises ``ValueError`` for weights that may not be read, or that lie elsewhere than the model."""
    if find_adapter_config_file(source) is not None:  # names a model anywhere, and may have its weights in a pickle
        raise ValueError("it is an adapter, or has one beside its weights; merge it, and save the model that gives")
    pickles = sorted(file.name for suffix in (".bin", ".pt", ".pth") for file in path.glob(f"*{suffix}"))
    if pickles and not any(path.glob("*.safetensors")):
        raise ValueError(f"its weights are a pickle ({pickles[0]}); {_PICKLES}")
    config = AutoConfig.from_pretrained(source, **common)
    named = getattr(config, "transformers_weights", None)  # goes before use_safetensors
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"its config names {named!r} as its weights; {_PICKLES}")
    for index in {SAFE_WEIGHTS_INDEX_NAME, str(named)}:
        if index.endswith(".index.json"):
            _check_index(source, index)


def _check_index(source: str, name: str) -> None:
    """Raises ``ValueError`` unless the files that an index of shards names are safetensors beside it."""
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return
    named = map(str, json.loads(Path(found).read_bytes())["weight_map"].values())
    strange = sorted({file for file in named if not file.endswith(".safetensors") or Path(file).name != file})
    if strange:
        raise ValueError(
            f"its {name} names {strange[0]!r} as weights, which is no safetensors file beside it; {_PICKLES}"
        )


def prepare(tokenizer: Any) -> Any:
    """Sets left padding and a padding token, which batches of prompts need."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError("the tokenizer has neither a padding nor an end-of-sequence token; set pad_token on it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_device(device: str | torch.device) -> torch.device:
    """The device, if it is there."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}; use cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda was asked for, but torch sees no CUDA or ROCm device; use --device cpu")
    return found


def _on_the_hub(source: str) -> str:
    return f"on the Hugging Face hub (there is no directory {source!r} here)"


def _why(error: BaseException, trust: bool) -> str:
    if "trust_remote_code" in str(error) and not trust:
        return "it needs code of its own; read that, and if you trust it, give --trust-remote-code"
    if "use_safetensors" in str(error):
        return f"it has no safetensors files; {_PICKLES}"
    plain = isinstance(error, OSError | ValueError | RuntimeError)
    return _first_line(error) if plain else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


__all__ = ["DTYPES", "LanguageModel", "check_device", "load_model", "prepare"]
