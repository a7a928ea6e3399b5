"""Loads a causal language model and its tokenizer from a Hugging Face id, a local directory or a GGUF file."""

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
    "a pickle can contain code, so weights are read from safetensors or GGUF files only; "
    "if you trust the file, convert it to safetensors"
)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in evaluation mode, with its tokenizer, which pads on the left.

    Args:
        model: the transformers model.
        tokenizer: the model's tokenizer.
        source: Hugging Face id, directory or GGUF file that the model was loaded from.
        adapters: names of the parameters that ``lora.add_lora`` added; empty for a model without adapters.
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
    """Loads a model and its tokenizer. Weights are read from safetensors or GGUF files only.

    All floating-point parameters are cast to ``dtype``. Buffers, such as rotary frequencies, keep the dtype that the
    architecture gives them, as in any other program that loads the model.

    Args:
        source: a local directory, a ``.gguf`` file, or a Hugging Face model id.
        dtype: dtype of the weights: float32, bfloat16 or float16.
        device: device to put the model on.
        trust_remote_code: whether code that comes with the model may run; if False, a model that needs such code
            raises.

    Raises:
        ModelError: if the model cannot be found or loaded (the message names the place searched), its weights are
            pickles, it is an adapter without its base model, or it needs remote code that is not trusted.
    """
    device = check_device(device)
    path = Path(source)
    if path.suffix == ".gguf" and not path.is_file():
        raise ModelError(f"there is no GGUF file {source!r}")
    try:
        model, tokenizer = _load_with_transformers(path, source, dtype, trust_remote_code)
    except ImportError as error:
        if path.suffix != ".gguf":
            raise ModelError(f"cannot load the model {source!r}: {error}") from error
        raise ModelError(
            f"GGUF files need the packages gguf and accelerate ({error}); {install_hint('gguf')}"
        ) from error
    except Exception as error:  # damaged files raise exceptions of any type in transformers and tokenizers
        raise ModelError(
            f"cannot load the model {source!r} {_place(path, source)}: {_reason(error, trust_remote_code)}"
        ) from error
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return LanguageModel(model.to(device).eval().requires_grad_(False), prepare_tokenizer(tokenizer), source)


def _load_with_transformers(path: Path, source: str, dtype: torch.dtype, trust: bool) -> tuple[Any, Any]:
    """Returns the model and its tokenizer as transformers loads them."""
    # Always passed, also when False: without it transformers would ask at the terminal.
    common: dict[str, Any] = {"trust_remote_code": trust}
    model_options: dict[str, Any] = {}
    if path.suffix == ".gguf":
        source, common, model_options = str(path.parent), common | {"gguf_file": path.name}, _dequantize_gguf()
    else:
        _check_weights(path, source, common)
    tokenizer = AutoTokenizer.from_pretrained(source, **common)
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True, **common, **model_options
    )
    if missing := sorted(loading_info["missing_keys"]):  # transformers would initialize them at random
        raise ValueError(f"its weights lack {len(missing)} of the model's tensors, among them {missing[0]!r}")
    return model, tokenizer


def _dequantize_gguf() -> dict[str, Any]:
    """Options that make transformers dequantize a GGUF file.

    A model that stays quantized computes with kernels from the hub and cannot be saved.
    """
    gguf_config = getattr(transformers, "GgufConfig", None)  # versions without this class always dequantize
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


def _check_weights(path: Path, source: str, common: dict[str, Any]) -> None:
    """Raises ``ValueError`` for an adapter, for pickled weights, and for weights outside the model's directory."""
    if find_adapter_config_file(source) is not None:  # its base model can be anywhere, and its weights can be a pickle
        raise ValueError(
            "it is an adapter or contains one; merge the adapter into its base model, save that, and load the result"
        )
    pickles = sorted(file.name for suffix in (".bin", ".pt", ".pth") for file in path.glob(f"*{suffix}"))
    if pickles and not any(path.glob("*.safetensors")):
        raise ValueError(f"its weights are a pickle ({pickles[0]}); {_PICKLES}")
    config = AutoConfig.from_pretrained(source, **common)
    weights_name = getattr(config, "transformers_weights", None)  # has precedence over use_safetensors
    if weights_name is not None and not str(weights_name).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"its config names {weights_name!r} as its weights; {_PICKLES}")
    for index in {SAFE_WEIGHTS_INDEX_NAME, str(weights_name)}:
        if index.endswith(".index.json"):
            _check_index(source, index)


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
            f"{_PICKLES}"
        )


def prepare_tokenizer(tokenizer: Any) -> Any:
    """Sets left padding and a padding token, which batches of prompts need. Changes and returns the tokenizer.

    Raises:
        ModelError: if the tokenizer has neither a padding token nor an end-of-sequence token to use instead.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError("the tokenizer has neither a padding nor an end-of-sequence token; set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_device(device: str | torch.device) -> torch.device:
    """Returns the device as ``torch.device``.

    Raises:
        ModelError: if torch does not know the device, or it is a GPU that torch does not see.
    """
    try:
        checked = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}; use cpu or cuda") from error
    if checked.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda was requested, but torch sees no CUDA or ROCm device; use --device cpu")
    return checked


def _place(path: Path, source: str) -> str:
    """Says where the model was looked for, for error messages."""
    if path.is_dir():
        return "as a directory"
    if path.suffix == ".gguf":
        return "as a GGUF file"
    return f"on the Hugging Face hub (there is no directory {source!r} here)"


def _reason(error: BaseException, trust: bool) -> str:
    """Says why a model could not be loaded, in one line."""
    if "trust_remote_code" in str(error) and not trust:
        return "it needs code of its own; read that, and if you trust it, give --trust-remote-code"
    if "use_safetensors" in str(error):
        return f"it has no safetensors files; {_PICKLES}"
    message_is_clear = isinstance(error, OSError | ValueError | RuntimeError)
    return _first_line(error) if message_is_clear else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


__all__ = ["DTYPES", "LanguageModel", "check_device", "load_model", "prepare_tokenizer"]
