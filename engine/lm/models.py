"""Loads a causal language model and its tokenizer from a Hugging Face id, a local directory or a GGUF file."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..errors import ConfigError, MeerkatError, ModelError
from ..extras import install_hint
from .gguf_files import GgufFile
from .hub_connection import hub_or_cache
from .model_source import PICKLES, check_source
from .own_dtype import holding_dtype
from .packed import AGAIN, ON_CPU, PackedParameter, check_complete, check_installed, take_packed
from .padding_probe import check_padding
from .quantize import Offload, Quantize, freeze_base
from .weight_files import check_all_used, safetensors_files, tensor_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBE = "The film was long, but its story and its actors kept me in my seat until the very end of it."
_PROBE_TOKENS = 12
# Makes transformers list the tensors that do not fit, in place of an error that names none.
_REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}


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
    quantize: str = Quantize.NONE,
    offload: str = Offload.NONE,
    adds: bool = False,
    rounds: bool = False,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Loads a model and its tokenizer. Weights are read from safetensors or GGUF files only.

    All floating-point parameters are cast to ``dtype``, and all parameters are trainable. Buffers, such as rotary
    frequencies, keep the dtype that the architecture gives them, as in any other program that loads the model.

    What the files hold and what the model holds are compared in both directions. Tensors that the architecture lists as
    not its own, such as further prediction heads, are named in a warning; any other difference raises.

    Args:
        source: a local directory, a ``.gguf`` file, or a Hugging Face model id.
        dtype: dtype of the weights: float32, bfloat16 or float16.
        device: device to put the model on.
        quantize: how the weights are kept, a value of ``Quantize``; all but ``NONE`` are read-only, and masked weights
            live beside them. A checkpoint that bitsandbytes or torchao has quantized is loaded with ``AS_STORED``, and
            stays packed. The peak of the host's memory is then the result, and a few copies of one parameter: the files
            are mapped, not read (a GGUF file is first made a model in float32).
        offload: where read-only weights are kept, a value of ``Offload``.
        adds: how live values get into a linear layer with read-only weights; see ``FrozenWeight``.
        rounds: whether live values are rounded to int8; see ``FrozenWeight``.
        trust_remote_code: whether code that comes with the model may run; if False, a model that needs such code
            raises.

    Raises:
        ConfigError: if an option is unknown or has no effect without ``quantize``, a package that ``quantize`` needs is
            missing, or the model has no layer that can be quantized.
        ModelError: if the model cannot be found or loaded (the message names the place searched); its weights are
            pickles, are packed (quantized) and cannot be kept so, or do not belong to its config; it is an adapter
            without its base model; it needs remote code that is not trusted; its tokenizer has tokens that it does not
            know; or left padding changes its scores.
    """
    device = check_device(device)
    quantize, offload = _checked(quantize, offload, adds=adds, rounds=rounds)
    path = Path(source)
    if path.suffix == ".gguf" and not path.is_file():
        raise ModelError(f"there is no GGUF file {source!r}")
    try:
        local = path.exists() or path.suffix == ".gguf"
        with torch.device("cpu"), nullcontext() if local else hub_or_cache(repr(source)):
            loaded = dtype if quantize is Quantize.NONE else _mapped_dtype(path, source)
            as_stored = quantize is Quantize.AS_STORED
            model, tokenizer, gguf, packed = _load_with_transformers(path, source, loaded, trust_remote_code, as_stored)
        if quantize is Quantize.NONE:
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
            model.to(device)
        else:
            stored = {name: parameter.stored for name, parameter in packed.items()}
            freeze_base(
                model, quantize, dtype, device, gguf=gguf, packed=stored, offload=offload, adds=adds, rounds=rounds
            )
        lm = LanguageModel(model.eval(), prepare_tokenizer(tokenizer), source)
        _check_tokens(lm)
        check_padding(lm.model, _probe_ids(lm), lm.tokenizer.pad_token_id, dtype)
    except ImportError as error:
        if path.suffix != ".gguf":
            raise ModelError(f"cannot load the model {source!r}: {error}") from error
        raise ModelError(
            f"GGUF files need the packages gguf and accelerate ({error}); {install_hint('gguf')}"
        ) from error
    except ConfigError:
        raise
    except Exception as error:  # damaged files raise exceptions of any type in transformers and tokenizers
        raise ModelError(
            f"cannot load the model {source!r} {_place(path, source)}: {_reason(error, trust_remote_code)}"
        ) from error
    return lm


def _checked(quantize: str, offload: str, *, adds: bool, rounds: bool) -> tuple[Quantize, Offload]:
    """Returns the members with these names; raises ``ConfigError`` for others, and for what would have no effect."""
    for name, value, known in (("quantize", quantize, Quantize), ("offload", offload, Offload)):
        if value not in list(known):
            raise ConfigError(f"unknown choice {name}={value!r}; known: {', '.join(known)}")
    if quantize == Quantize.NONE and (adds or rounds or offload != Offload.NONE):
        raise ConfigError("adds, rounds and offload are for read-only weights; give quantize too")
    return Quantize(quantize), Offload(offload)


def _mapped_dtype(path: Path, source: str) -> torch.dtype:
    """The dtype in which transformers maps a model's files, and a GGUF file is dequantized, without rounding."""
    return torch.float32 if path.suffix == ".gguf" else DTYPES[holding_dtype(source)]


def _load_with_transformers(
    path: Path, source: str, dtype: torch.dtype, trust: bool, as_stored: bool
) -> tuple[Any, Any, GgufFile | None, dict[str, PackedParameter]]:
    """Returns the model and its tokenizer as transformers loads them, after comparing the model with its files.

    The third result is the GGUF file; None for other files. The fourth is what the model lacks: its packed parameters,
    which may be there if weights are kept as they are stored.
    """
    # Always passed, also when False: without it transformers would ask at the terminal.
    options: dict[str, Any] = {"trust_remote_code": trust}
    if path.suffix == ".gguf":
        return *_load_gguf(path, dtype, options), {}
    weights_name, method = check_source(source, options, as_stored=as_stored)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model, packed = load_complete(AutoModelForCausalLM, source, dtype, options, weights_name, method)
    return model, tokenizer, None, packed


def load_complete(
    kind: Any,
    source: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    weights_name: str | None = None,
    method: str | None = None,
) -> tuple[Any, dict[str, PackedParameter]]:
    """Loads a model from safetensors files and compares it with them.

    Packed parameters have no values in the model; they are returned beside it, by name.

    Args:
        kind: class whose ``from_pretrained`` loads the model.
        source: a local directory or a Hugging Face id.
        dtype: dtype of the weights.
        options: further options for ``from_pretrained``.
        weights_name: file name of the weights or their index that the model's config names; None if it names none.
        method: the method by which they are packed; see ``check_source``.

    Raises:
        ConfigError: if a package that packed weights need is missing.
        ValueError: if the files lack tensors of the model, or hold tensors that it does not use.
    """
    if method is None:
        model, info = kind.from_pretrained(source, dtype=dtype, use_safetensors=True, **_REPORT, **options)
    else:
        check_installed(method)
        check_complete(method, tensor_names(safetensors_files(source, weights_name)))
        try:
            model, info = kind.from_pretrained(
                source, dtype=dtype, use_safetensors=True, **_REPORT, **options, **ON_CPU
            )
        except RuntimeError as error:  # it fills what is missing with random numbers, and cannot in integers
            raise ValueError(
                f"transformers cannot read its weights packed by {method} ({_first_line(error)}): a tensor may be "
                f"missing, be damaged, or belong to no layer; {AGAIN}"
            ) from error
    _check_loaded(info)
    packed = take_packed(model)
    tensors = {name: parameter.tensors for name, parameter in packed.items()}
    check_all_used(model, safetensors_files(source, weights_name), info["unexpected_keys"], tensors)
    return model, packed


def _load_gguf(path: Path, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any, GgufFile]:
    options = options | {"gguf_file": path.name}
    directory = str(path.parent)
    file = GgufFile(path)
    config = AutoConfig.from_pretrained(directory, **options)
    file.check_settings(config)
    tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    file.remove_new_tokens(tokenizer)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=dtype, **_REPORT, **options, **_dequantize_gguf()
    )
    _check_loaded(info)
    file.check_tensors(model)
    return model, tokenizer, file


def _check_loaded(loading_info: dict[str, Any]) -> None:
    """Checks that the weights have every tensor of the model, in its shape.

    Raises:
        ValueError: if they do not; transformers would initialize these tensors at random.
    """
    if mismatched := sorted(loading_info["mismatched_keys"], key=str):
        name, stored, shape = mismatched[0]
        raise ValueError(
            f"{len(mismatched)} stored tensors have another shape than in the model, among them {name!r}, "
            f"{tuple(stored)} instead of {tuple(shape)}; use the config that belongs to the weights"
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(f"its weights lack {len(missing)} of the model's tensors, among them {missing[0]!r}")


def _dequantize_gguf() -> dict[str, Any]:
    """Options that make transformers dequantize a GGUF file.

    A model that stays quantized computes with kernels from the hub and cannot be saved.
    """
    gguf_config = getattr(transformers, "GgufConfig", None)  # versions without this class always dequantize
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


def max_positions(model: nn.Module) -> int | None:
    """Number of positions that a model has been built for: the longest sequence, in tokens; None if it has no limit.

    Args:
        model: a transformers model.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    values = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _check_tokens(lm: LanguageModel) -> None:
    """Checks that the tokenizer is one that this project can use, and that the model knows its tokens.

    Raises:
        ModelError: if the tokenizer cannot tell where in a text its tokens are, or has tokens beyond the embedding.
    """
    tokenizer = lm.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"its tokenizer {type(tokenizer).__name__} cannot tell where in a text its tokens are; save the model with "
            f"a fast tokenizer (a tokenizer.json)"
        )
    rows = lm.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        number, token = next((entry for entry in beyond if entry[0] == tokenizer.pad_token_id), beyond[0])
        role = "the padding token" if number == tokenizer.pad_token_id else "among them"
        raise ModelError(
            f"{len(beyond)} of its tokenizer's tokens are beyond the {rows} rows of its embedding, {role} {token!r} "
            f"with id {number}; resize the embedding (resize_token_embeddings) and save the model, or remove the tokens"
        )


def _probe_ids(lm: LanguageModel) -> list[int]:
    """Token ids of a short text, for ``check_padding``.

    Raises:
        ModelError: if the text has fewer than three tokens.
    """
    limit = min(_PROBE_TOKENS, max_positions(lm.model) or _PROBE_TOKENS)
    ids = [int(number) for number in lm.tokenizer(_PROBE)["input_ids"][:limit]]
    if len(ids) < 3:
        raise ModelError(f"its tokenizer makes {len(ids)} tokens of the text {_PROBE!r}; use the model's own tokenizer")
    return ids


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
        return f"it has no safetensors files; {PICKLES}"
    message_is_clear = isinstance(error, MeerkatError | OSError | ValueError | RuntimeError)
    return _first_line(error) if message_is_clear else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """First line of an error's message, with the second one if that explains it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


__all__ = [
    "DTYPES",
    "LanguageModel",
    "check_device",
    "load_complete",
    "load_model",
    "max_positions",
    "prepare_tokenizer",
]
