"""Loading a causal language model and its tokenizer: Hugging Face id, local directory, or GGUF file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def load_model(source: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> LanguageModel:
    """Loads a model and its tokenizer. Code from a model repository is never run.

    Args:
        source: a local directory, a ``.gguf`` file, or a Hugging Face model id.
        dtype: of the weights: float32, bfloat16 or float16.
        device: where to put the model.

    Raises:
        ModelError: if it cannot be found or loaded, saying what was looked for.
    """
    device = check_device(device)
    path = Path(source)
    arguments: dict[str, Any] = {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no GGUF file {source!r}")
        folder, arguments = str(path.parent), {"gguf_file": path.name}
    else:
        folder = source
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **arguments)
    except ImportError as error:
        if not arguments:
            raise ModelError(f"cannot load the model {source!r}: {error}") from error
        raise ModelError(f"GGUF files need two more packages: pip install 'meerkat-engine[gguf]' ({error})") from error
    except (OSError, ValueError, RuntimeError) as error:
        looked = "as a directory" if path.is_dir() else "as a GGUF file" if arguments else "on the Hugging Face hub"
        if not arguments and not path.is_dir():
            looked += f" (there is no directory {source!r} here)"
        raise ModelError(f"cannot load the model {source!r} {looked}: {_first_line(error)}") from error
    return LanguageModel(model.to(device=device, dtype=dtype).eval().requires_grad_(False), prepare(tokenizer), source)


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


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


__all__ = ["DTYPES", "LanguageModel", "check_device", "load_model", "prepare"]
