"""Checks a model against its safetensors files: every tensor is used, refused, or named in a warning.

transformers drops tensors that an architecture does not use, and keeps quiet about those that the architecture lists as
known. So the names in the files' headers are compared with the model's.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

_FLOATS = {"F64", "F32", "BF16", "F16"}
# Buffers of older versions of transformers, which may still be in a file: their values are computed from the config.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is stored, and its dtype and shape as in the file's header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    def read(self, name: str) -> Tensor:
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(name)  # type: ignore[no-any-return]


def safetensors_files(source: str, named: str | None = None) -> list[Path]:
    """Finds the safetensors files that transformers reads for a model, in the order of their names.

    Args:
        source: a local directory or a Hugging Face id, whose files are downloaded.
        named: file name of weights or index that the model's config names; None: transformers' default names.

    Raises:
        OSError: if there is no such file.
    """
    for name in filter(None, (named, SAFE_WEIGHTS_NAME)):
        if name.endswith(".safetensors"):
            file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if file is not None:
                return [Path(file)]
    index_name = named if named is not None and named.endswith(".json") else SAFE_WEIGHTS_INDEX_NAME
    index = Path(cached_file(source, index_name))
    shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    return [Path(cached_file(source, shard)) for shard in shards]


def tensor_names(files: Iterable[Path]) -> set[str]:
    """Returns the names of all tensors in safetensors files.

    Raises:
        ValueError: if a name is in two of them.
    """
    return set(_stored_tensors(files))


def check_all_used(
    model: nn.Module,
    files: Iterable[Path],
    unexpected: Iterable[str],
    packed: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Checks that a model's parameters and the tensors in its files are the same set.

    Tensors that the architecture lists as not its own, such as further prediction heads, are named in a warning.
    Buffers that a file holds with the values that the model computes itself are ignored.

    Args:
        model: the loaded transformers model.
        files: the safetensors files that it was loaded from.
        unexpected: names of tensors that transformers reported as not used, under its own names for them.
        packed: by parameter name, the tensors of the files that a packed parameter was read from, by their names there;
            the model itself has no values of these parameters.

    Raises:
        ValueError: if a tensor is not used, is in two files, is of an integer or 8-bit type where the model has
            floating-point numbers, or a parameter has no tensor; or if a tensor of a packed parameter is missing, or
            was not read as it is.
    """
    stored, packed = _stored_tensors(files), packed or {}
    parts = {name: part for of_one in packed.values() for name, part in of_one.items()}
    own = model.state_dict(keep_vars=True)
    without_values = {id(own[name]) for name in packed}
    own = {name: entry for name, entry in own.items() if id(entry) not in without_values}
    entries = own | parts
    matches = {name: _match(model, name, entries) for name in stored}
    for name, entry in matches.items():
        if entry is None:
            continue
        if entry in parts:
            _check_read(name, stored[name], parts[entry])
        elif stored[name].dtype not in _FLOATS and entries[entry].is_floating_point():
            raise ValueError(_packed(name, stored[name]))
    if missing := sorted(parts.keys() - set(matches.values())):
        raise ValueError(f"its weights lack {len(missing)} of their packed tensors, among them {missing[0]!r}")
    rest = {name: tensor for name, tensor in stored.items() if matches[name] is None}
    for name in _unused(model, rest, unexpected):
        del rest[name]
    for name, tensor in rest.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(_packed(name, tensor))
    _check_same_elements(model, own, rest, {entry for entry in matches.values() if entry in own})


def _check_read(name: str, stored: _Stored, part: Tensor) -> None:
    """Checks that a packed tensor was read as it is stored: bits with a meaning of their own, not to be cast.

    Raises:
        ValueError: if it was not.
    """
    if ".quant_state." in name:  # JSON, from which bitsandbytes makes the state, and which it writes in its own way
        return
    value = stored.read(name)
    if value.dtype != part.dtype or value.shape != part.shape or not torch.equal(_bits(value), _bits(part)):
        raise ValueError(
            f"its packed tensor {name!r} ({stored.dtype} {list(stored.shape)} in {stored.file.name}) was read as other "
            f"values ({part.dtype} {list(part.shape)}), so the layer would compute something else; quantize it with a "
            f"newer version of its library, or load the checkpoint that it was quantized from"
        )


def _stored_tensors(files: Iterable[Path]) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                if name in stored:
                    raise ValueError(
                        f"its tensor {name!r} is both in {stored[name].file.name} and in {file.name}; only one of them "
                        f"would be used, so remove the other"
                    )
                tensor = tensors.get_slice(name)
                stored[name] = _Stored(file, str(tensor.get_dtype()), tuple(tensor.get_shape()))
    return stored


def _names(model: nn.Module, name: str) -> tuple[str, ...]:
    """Names under which the model may have a stored tensor: a file may be of the model without its head, or with it."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, f"{prefix}{name}", name.removeprefix(prefix)


def _match(model: nn.Module, name: str, entries: Mapping[str, Tensor]) -> str | None:
    return next((candidate for candidate in _names(model, name) if candidate in entries), None)


def _packed(name: str, tensor: _Stored) -> str:
    return (
        f"its weights are packed: {name!r} in {tensor.file.name} is of dtype {tensor.dtype}; load the checkpoint that "
        f"it was quantized from, or dequantize it and save the result"
    )


def _unused(model: nn.Module, rest: Mapping[str, _Stored], unexpected: Iterable[str]) -> list[str]:
    """Lists the tensors without an entry in the model that it can do without, and warns of those that may matter.

    Args:
        model: the loaded model.
        rest: the tensors that the model has no entry for under their names.
        unexpected: see ``check_all_used``.

    Raises:
        ValueError: if transformers did not use a tensor that neither the architecture lists nor the model computes.
    """
    ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    listed = re.compile("|".join(f"(?:{pattern})" for pattern in (*ignored, *_COMPUTED)))
    reported = set(unexpected)
    by_name = {name: name for name in rest} | {other: name for name in rest for other in _names(model, name)}
    dropped = {by_name.get(name, name) for name in reported}
    dropped |= {name for name in rest if any(map(listed.search, _names(model, name)))}
    dropped -= {name for name in dropped & rest.keys() if _is_computed(model, name, rest[name])}
    warned = {name for name in dropped if any(map(listed.search, _names(model, name)))}
    if refused := sorted(dropped - warned):
        raise ValueError(
            f"{type(model).__name__} with this config does not use {len(refused)} of the tensors in its weights, among "
            f"them {refused[0]!r}; use the config that belongs to the weights, or save the model without these tensors"
        )
    if warned:
        warnings.warn(
            f"{type(model).__name__} does not use {len(warned)} of the tensors in its weights, among them "
            f"{min(warned)!r}; they are neither trained nor saved",
            stacklevel=2,
        )
    return sorted((warned | {name for name in rest if _is_computed(model, name, rest[name])}) & rest.keys())


def _is_computed(model: nn.Module, name: str, stored: _Stored) -> bool:
    """Whether a stored tensor is a buffer of an older version, with the values that the model has or computes."""
    last = name.rpartition(".")[2]
    if last == "inv_freq":
        value = stored.read(name).float()
        return any(
            buffer.shape == value.shape and torch.allclose(buffer.float().cpu(), value, rtol=1e-2, atol=1e-6)
            for other, buffer in model.named_buffers()
            if other.endswith("inv_freq")
        )
    if last == "position_ids":
        value = stored.read(name)
        return torch.equal(value, torch.arange(value.shape[-1], dtype=value.dtype, device="cpu").expand_as(value))
    if last == "masked_bias":  # the number added to masked scores
        return stored.elements == 1 and stored.read(name).item() <= -1e4
    if last == "bias" and len(stored.shape) == 4 and stored.shape[2] == stored.shape[3]:  # the causal mask
        value = stored.read(name).to(torch.bool)
        return torch.equal(value, torch.ones(stored.shape, dtype=torch.bool, device="cpu").tril())
    return False


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _check_same_elements(
    model: nn.Module, entries: Mapping[str, Any], rest: Mapping[str, _Stored], matched: set[str]
) -> None:
    """Checks that the stored tensors without an entry of their name are those that the remaining parameters hold.

    transformers renames, splits and merges tensors of some architectures, which leaves the number of elements equal.

    Args:
        model: the model.
        entries: its parameters and buffers by name, without packed ones.
        rest: the stored tensors without an entry of their name.
        matched: names of the entries that have a stored tensor.

    Raises:
        ValueError: if the numbers differ.
    """
    known = {id(entries[name]) for name in matched}
    left = [(name, entry) for name, entry in _distinct(entries) if id(entry) not in known]
    parameters = [(name, entry) for name, entry in left if isinstance(entry, nn.Parameter)]
    if not rest and not parameters:
        return
    held = sum(tensor.elements for tensor in rest.values())
    if held not in {sum(entry.numel() for _, entry in entries) for entries in (left, parameters)}:
        example = min(rest, default=None) or parameters[0][0]
        raise ValueError(
            f"its weights and {type(model).__name__} do not match: {len(rest)} stored tensors with {held} elements "
            f"have no parameter of their name, and {len(parameters)} parameters with "
            f"{sum(entry.numel() for _, entry in parameters)} elements no tensor, among them {example!r}; use the "
            f"config that belongs to the weights"
        )


def _distinct(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Iterates over the entries of a state dict, tied ones once."""
    seen: set[int] = set()
    for name, entry in entries.items():
        if id(entry) not in seen:
            seen.add(id(entry))
            yield name, entry


__all__ = ["check_all_used", "safetensors_files", "tensor_names"]
