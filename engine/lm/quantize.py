"""Keeps the weights that a run does not change in few bytes: in the checkpoint's own format, or quantized."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from ..frozen.freeze import Storing, freeze
from ..frozen.quantized import GgufStored, Int8Stored, Nf4Stored, TorchaoStored
from ..frozen.stored import PlainStored, Stored
from ..frozen.weight import frozen_weights
from .gguf_files import GgufFile


class Quantize(StrEnum):
    """How the weights of a base model are kept.

    ``NONE``: in the run's dtype; masked weights are written in place.
    ``AS_STORED``: as the checkpoint has them: in bfloat16, mapped from its files; in the blocks of a GGUF file; or as
    bitsandbytes or torchao has quantized them.
    ``NF4``: linear layers in 4 bits, by bitsandbytes.
    ``INT8``: linear layers in 8 bits, by bitsandbytes.
    ``TORCHAO_INT8``: linear layers in 8 bits, by torchao.

    All but the first are read-only, and the masked weights live beside them. Parameters that are not quantized are kept
    as the checkpoint has them.
    """

    NONE = "none"
    AS_STORED = "as-stored"
    NF4 = "nf4"
    INT8 = "int8"
    TORCHAO_INT8 = "torchao-int8"


class Offload(StrEnum):
    """Where read-only weights are while another device computes; each is copied there when it is used.

    ``NONE``: on the device. ``CPU``: in the host's memory, pinned. ``DISK``: in the checkpoint's files, which are
    mapped; weights that are quantized on loading in the host's memory.
    """

    NONE = "none"
    CPU = "cpu"
    DISK = "disk"


_QUANTIZERS: dict[Quantize, Callable[[Tensor], Stored]] = {
    Quantize.NF4: Nf4Stored.quantize,
    Quantize.INT8: Int8Stored.quantize,
    Quantize.TORCHAO_INT8: TorchaoStored.quantize,
}


def freeze_base(
    model: nn.Module,
    kind: Quantize,
    dtype: torch.dtype,
    device: torch.device,
    *,
    gguf: GgufFile | None = None,
    packed: Mapping[str, Stored] | None = None,
    offload: Offload = Offload.NONE,
    adds: bool = False,
    rounds: bool = False,
) -> None:
    """Makes the parameters of a model read-only, in a format that takes fewer bytes.

    Works parameter by parameter: beside the model and the result, there are up to four copies of one parameter in
    float32, in which its library quantizes it.

    Args:
        model: the model, on the CPU, in the dtype of its checkpoint.
        kind: the format.
        dtype: dtype in which the model computes.
        device: device on which it computes.
        gguf: the GGUF file that it was loaded from; None for other files.
        packed: by name, the values of parameters that the checkpoint holds packed, and that have none in the model.
        offload: where the weights are kept.
        adds: how live values get into a linear layer; see ``FrozenWeight``.
        rounds: whether they are rounded to the format, which must be int8; see ``FrozenWeight``.

    Raises:
        ConfigError: if a package is missing, or the model has no layer that can be quantized.
    """
    device = torch.empty(0, dtype=dtype, device=device).device  # with its index
    if offload is not Offload.NONE and device.type == "cpu":
        raise ConfigError("offload is for weights that a GPU computes with; on a CPU, leave --offload out")
    if rounds and kind is not Quantize.INT8:
        raise ConfigError(f"masked weights are rounded to int8 only, not to {kind}; give --quantize int8")
    _make_buffers_for(dtype, model, is_packed=bool(packed))
    store = _as_stored(gguf, packed or {})
    if kind is not Quantize.AS_STORED:
        store = _quantizing(model, _QUANTIZERS[kind], store)
    place = _PLACES[offload]
    freeze(
        model,
        lambda name, values: place(store(name, values), device),
        dtype=dtype,
        device=device,
        adds=adds,
        rounds=rounds,
    )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def describe_frozen(model: nn.Module) -> str | None:
    """Says in which formats the read-only weights of a model are kept; None if it has none."""
    stored = [weight.stored for weight in frozen_weights(model).values()]
    if not stored:
        return None
    elements: Counter[str] = Counter()
    for values in stored:
        elements[values.format] += values.shape.numel()
    formats = ", ".join(f"{count:,} elements in {name}" for name, count in elements.most_common())
    return f"read-only base weights, {sum(values.nbytes for values in stored) / 1e6:,.1f} MB: {formats}"


# Brings stored values to the place where they are kept.
_PLACES: dict[Offload, Callable[[Stored, torch.device], Stored]] = {
    Offload.NONE: lambda stored, device: stored.to(device),
    Offload.CPU: lambda stored, _: stored.pinned(),
    Offload.DISK: lambda stored, _: stored,
}


def _make_buffers_for(dtype: torch.dtype, model: Any, *, is_packed: bool) -> None:
    """Makes the buffers as in a model that was loaded in a dtype. Some have it, such as Gemma's scale of embeddings.

    They are those of a twin of the model, which has no weights: its parameters are on the meta device.
    """
    if model.dtype is dtype and not is_packed:  # a packed model's buffers may have another dtype than its parameters
        return
    with torch.device("meta"):
        twin = type(model)._from_config(model.config, dtype=dtype)
    for module in twin.modules():
        module._is_hf_initialized = False
        for name, buffer in module._buffers.items():
            if buffer is not None and name in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    twin.initialize_weights()
    for path, module in twin.named_modules():
        own = model.get_submodule(path)._buffers
        for name, buffer in module._buffers.items():
            if buffer is not None:
                own[name] = buffer if name in module._non_persistent_buffers_set else own[name].to(buffer.dtype)


def quantizable(model: Any) -> frozenset[str]:
    """Names of the parameters that are quantized: matrices of linear layers, as transformers chooses them.

    The output head and embeddings are not among them.
    """
    kept = {id(p) for module in (_output_head(model), model.get_input_embeddings()) for p in _parameters(module)}
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in kept
    )


def _quantizing(model: nn.Module, quantize: Callable[[Tensor], Stored], others: Storing) -> Storing:
    names = quantizable(model)
    if not names:
        raise ConfigError(f"{type(model).__name__} has no linear layers that could be quantized; leave --quantize out")
    return lambda name, values: quantize(values) if name in names else others(name, values)


def _output_head(model: Any) -> nn.Module | None:
    return model.get_output_embeddings()  # type: ignore[no-any-return]


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _as_stored(file: GgufFile | None, packed: Mapping[str, Stored]) -> Storing:
    """Keeps packed values, and the blocks of a GGUF file. Other parameters are kept as they were loaded."""

    def store(name: str, values: Tensor) -> Stored:
        if name in packed:
            return packed[name]
        tensor = None if file is None else file.tensors.get(file.tensor_name(name) or "")
        if tensor is None:
            return PlainStored(values)
        if (dtype := _PLAIN.get(tensor.tensor_type.name)) is not None and torch.equal(values.to(dtype).float(), values):
            return PlainStored(values.to(dtype))
        return (_blocks(tensor, values) if values.dim() == 2 else None) or PlainStored(values)

    return store


# Types of GGUF files that are no blocks, and that are loaded in float32.
_PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}


def _blocks(tensor: Any, values: Tensor) -> Stored | None:
    """The blocks of a tensor of a GGUF file, if they hold exactly these values, maybe with their rows in another order.

    transformers orders the rows of query and key projections of some architectures anew. The blocks are ordered alike.
    """
    type_number, rows = int(tensor.tensor_type), values.shape[0]
    if not GgufStored.supports(type_number) or tuple(map(int, tensor.shape)) != tuple(reversed(values.shape)):
        return None
    with warnings.catch_warnings():  # the file is mapped to be read only, and frozen weights are never written
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        blocks = torch.from_numpy(tensor.data).view(rows, -1)
    stored = GgufStored(blocks, type_number, tensor.tensor_type.name, values.shape[1])
    dense = stored.dense(torch.float32, values.device)
    if torch.equal(dense, values):
        return stored
    order = _order_of_rows(dense, values)
    if order is None:
        return None
    return GgufStored(blocks[order], type_number, tensor.tensor_type.name, values.shape[1])


def _order_of_rows(rows: Tensor, wanted: Tensor) -> Tensor | None:
    """The order, int64 [n], in which rows [n, m] are the wanted ones, [n, m]; None if there is none."""
    places = {row.numpy().tobytes(): i for i, row in enumerate(rows)}
    order = [places.get(row.numpy().tobytes()) for row in wanted]
    if None in order:
        return None
    return torch.tensor(order, dtype=torch.int64, device="cpu")


__all__ = ["Offload", "Quantize", "describe_frozen", "freeze_base", "quantizable"]
