"""Checkpoints that bitsandbytes or torchao has quantized: their packed tensors become weights of plain layers.

transformers reads the files. Then the names, shapes and order of the parameters are those of the model that was
quantized, so masks and ledgers are the same for both.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..extras import install_hint
from ..frozen.quantized import Int8Stored, Nf4Stored, TorchaoStored
from ..frozen.stored import Stored

# The extra to install, by the name of the method in a config.
_EXTRAS = {"bitsandbytes": "quantize", "torchao": "torchao"}
METHODS = tuple(_EXTRAS)
AGAIN = "save the quantized model again, or load the checkpoint that it was quantized from"
# Further options of ``from_pretrained``: without them transformers would read onto a GPU.
ON_CPU: dict[str, Any] = {"device_map": {"": "cpu"}}


@dataclass(frozen=True)
class PackedParameter:
    """A parameter that a checkpoint holds packed.

    Args:
        stored: its values.
        tensors: the tensors of the files that they are made of, by the names there, as the model has read them.
    """

    stored: Stored
    tensors: Mapping[str, Tensor]


def check_installed(method: str) -> None:
    """Checks that the packages for a method of quantization are installed.

    Raises:
        ConfigError: if one is missing.
    """
    try:
        if method == "torchao":
            import torchao  # pyright: ignore[reportMissingImports]  # noqa: F401
        else:  # transformers needs the other one to read these
            import accelerate  # noqa: F401
            import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"weights quantized by {method} need the package {error.name} ({error}); {install_hint(_EXTRAS[method])}"
        ) from error


def check_complete(method: str, names: Iterable[str]) -> None:
    """Checks, before transformers reads them, that no layer quantized by bitsandbytes lacks one of its tensors.

    Args:
        method: the method; torchao's own reader finds what is missing.
        names: names of all tensors in the files.

    Raises:
        ValueError: if one is missing.
    """
    if method != "bitsandbytes":
        return
    names = set(names)
    layers: dict[str, set[str]] = {}
    for name in names:
        if found := _BESIDE.fullmatch(name):
            layers.setdefault(found["layer"], set()).add(found["part"])
    for layer, parts in sorted(layers.items()):
        needed = {"weight"} | ({"SCB"} if parts & {"SCB", "weight_format"} else {"weight.absmax", "weight.quant_map"})
        if any(part.startswith("weight.nested_") for part in parts):
            needed |= {"weight.nested_absmax", "weight.nested_quant_map"}
        missing = sorted(part for part in needed if f"{layer}.{part}" not in names)
        if "weight.absmax" in needed and not any(part.startswith("weight.quant_state.") for part in parts):
            missing.append("weight.quant_state")
        if missing:
            raise ValueError(f"its packed layer {layer!r} lacks the tensor {missing[0]!r}; {AGAIN}")


# Tensors beside the weight of a layer that bitsandbytes has quantized.
_BESIDE = re.compile(
    r"(?P<layer>.+)\.(?P<part>weight\.((nested_)?(absmax|quant_map)|quant_state\..+)|SCB|weight_format)"
)


def take_packed(model: Any) -> dict[str, PackedParameter]:
    """Takes the packed parameters out of a model, and leaves plain ones without values, on the meta device.

    Afterwards the model knows nothing of its quantization: it is saved as a plain model.

    Args:
        model: a model that transformers has read; any plain one is left as it is.

    Returns:
        The packed parameters by name, in the order of the model; empty for a plain model.

    Raises:
        ValueError: if a layer is not packed as the config says, is stored transposed, or quantizes activations too.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return {}
    quantizer.remove_quantization_config(model)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(name, None)
    if conversions := getattr(model, "_weight_conversions", None):  # how to read, which saving would do backwards
        model._weight_conversions = [conversion for conversion in conversions if not _unpacks(conversion)]
    take = _take_torchao if quantizer.quantization_config.quant_method == "torchao" else _take_bitsandbytes
    taken = take(model)
    return {name: taken[name] for name, _ in model.named_parameters() if name in taken}


def _unpacks(conversion: Any) -> bool:
    """Whether all that a conversion of transformers does is to put packed tensors together."""
    operations = getattr(conversion, "operations", [])
    own = ("transformers.integrations.bitsandbytes", "transformers.integrations.torchao")
    return bool(operations) and all(type(operation).__module__ in own for operation in operations)


def _take_bitsandbytes(model: Any) -> dict[str, PackedParameter]:
    """Puts the layers of a twin without weights in the place of the quantized ones, with the biases of these."""
    import bitsandbytes.nn

    with torch.device("meta"):
        twin = type(model)._from_config(model.config)
    taken = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
            continue
        plain, stored = twin.get_submodule(path), _stored(path, module)
        if stored.shape != plain.weight.shape:
            raise ValueError(
                f"its layer {path!r} is stored transposed ({list(stored.shape)} instead of {list(plain.weight.shape)}),"
                f" which is not supported; load the checkpoint that it was quantized from"
            )
        tensors = {f"{path}.{name}": tensor for name, tensor in module.state_dict().items() if name != "bias"}
        taken[f"{path}.weight"] = PackedParameter(stored, tensors)
        plain.bias = module.bias
        model.set_submodule(path, plain)
    return taken


def _stored(path: str, module: Any) -> Stored:
    """The values of a layer of bitsandbytes, after a check that its tensors belong together."""
    weight = module.weight
    stored: Stored | None = None
    if (state := getattr(weight, "quant_state", None)) is not None:
        stored, count = Nf4Stored(weight.data, state), math.prod(state.shape)
        fits = weight.nbytes == math.ceil(count / 2) and state.absmax.numel() == math.ceil(count / state.blocksize)
        fits &= state.nested or state.absmax.dtype is torch.float32
    elif (scales := getattr(weight, "SCB", None)) is not None:
        stored = Int8Stored(weight.data, scales)
        fits = weight.dtype is torch.int8 and scales.dtype is torch.float32 and scales.shape == weight.shape[:1]
    if stored is None or not fits:
        what = "no scales for it" if stored is None else "scales that do not belong to its packed weights"
        raise ValueError(f"its config says that the layer {path!r} is quantized, and its files hold {what}; {AGAIN}")
    return stored


def _take_torchao(model: nn.Module) -> dict[str, PackedParameter]:
    """Puts parameters without values in the place of torchao's tensors. Tied parameters stay tied."""
    taken, plain = {}, {}
    for name, parameter in model.named_parameters():
        quantized: Any = parameter.detach()
        if type(quantized) is Tensor:
            continue
        if getattr(quantized, "act_quant_kwargs", None) is not None:
            raise ValueError(
                f"its parameter {name!r} is for layers that quantize their inputs too, which is not supported; "
                f"quantize the weights alone, or load the checkpoint that it was quantized from"
            )
        path, _, own_name = name.rpartition(".")
        parts, _ = quantized.__tensor_flatten__()
        tensors = {f"{path}._{own_name}_{part}": getattr(quantized, part) for part in parts}
        taken[name] = PackedParameter(TorchaoStored(quantized), tensors)
        empty = torch.empty(quantized.shape, dtype=quantized.dtype, device="meta")
        plain[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for module in model.modules():
        for own_name, own in module._parameters.items():
            if id(own) in plain:
                module._parameters[own_name] = plain[id(own)]
                vars(module).pop("extra_repr", None)  # transformers' own, for packed weights
    return taken


__all__ = ["AGAIN", "METHODS", "ON_CPU", "PackedParameter", "check_complete", "check_installed", "take_packed"]
