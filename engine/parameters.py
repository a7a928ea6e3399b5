"""Element ids and fingerprints of a model. Parameters are numbered in order, each from the id of its first element.

A shared tensor counts once, at its first occurrence. Only floating-point tensors count.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import ModelError
from .frozen.weight import FrozenWeight

# Beginnings of the modules whose classes wrap a model, or become a base class of it, to train it in several processes.
_REPLICATING = ("torch.nn.parallel.distributed", "torch.distributed._composable.replicate")
_SHARDING = ("torch.distributed.fsdp",)


def floating_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterates over the parameters that have element ids, in id order: (name, parameter)."""
    return ((name, p) for name, p in model.named_parameters() if p.is_floating_point())


@dataclass(frozen=True)
class ParameterTable:
    """Name, shape and base id of every parameter that has element ids.

    Args:
        names: parameter names, as in ``model.named_parameters()``.
        shapes: shape of each parameter.
        bases: id of each parameter's first element.
        size: ``d``, the total number of elements.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bases: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterTable":
        """Builds the table of a model.

        Only shapes are read: a model on the meta device has a table too.

        Raises:
            ModelError: if the model is in a wrapper that trains it in several processes (DDP, FSDP), or a parameter is
                sharded over processes or has no shape yet; see ``check_whole``.
        """
        check_whole(model)
        names, shapes, bases, size = [], [], [], 0
        for name, parameter in floating_parameters(model):
            names.append(name)
            shapes.append(tuple(parameter.shape))
            bases.append(size)
            size += parameter.numel()
        return cls(tuple(names), tuple(shapes), tuple(bases), size)

    def to_json(self) -> str:
        """Encodes the table as one line of JSON: a list of [name, shape, base id]."""
        rows = zip(self.names, self.shapes, self.bases, strict=True)
        return json.dumps([[name, list(shape), base] for name, shape, base in rows], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "ParameterTable":
        """Decodes a table; the inverse of ``to_json``.

        Raises:
            ValueError: if the text is not a table that ``to_json`` could write. In particular each base id must be the
                running sum of the sizes before it; otherwise ids could point outside a tensor.
        """
        try:
            rows = [(name, tuple(shape), base) for name, shape, base in json.loads(text)]
        except (TypeError, RecursionError) as error:
            raise ValueError(f"the table is not a list of [name, shape, base id]: {error}") from error
        names: list[str] = []
        bases: list[int] = []
        size = 0
        for name, shape, base in rows:
            if not isinstance(name, str) or any(type(n) is not int or n < 0 for n in shape):
                raise ValueError(f"the table's row {name!r} has no valid shape")
            if type(base) is not int or base != size:
                raise ValueError(f"the table's row {name!r} begins at {base} instead of {size}")
            names.append(name)
            bases.append(base)
            size += math.prod(shape)
        if size >= 2**63:
            raise ValueError(f"the table has {size} elements, and element ids end at {2**63 - 1}")
        if len(set(names)) < len(names):
            raise ValueError("the table lists a parameter twice")
        return cls(tuple(names), tuple(shape for _, shape, _ in rows), tuple(bases), size)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the table, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def size_of(self, names: Collection[str]) -> int:
        """Counts the elements of the named parameters."""
        return sum(math.prod(shape) for name, shape in zip(self.names, self.shapes, strict=True) if name in names)

    def ranges(self, ids: Tensor) -> list[tuple[str, int, int, int]]:
        """Locates each parameter's elements in ascending ids: (name, base id, start, stop), in id order.

        Only parameters that contain some of the ids are listed. Their ids are ``ids[start:stop]``.
        """
        bounds = torch.searchsorted(
            ids, torch.tensor([*self.bases, self.size], dtype=torch.int64, device="cpu")
        ).tolist()
        rows = zip(self.names, self.bases, bounds[:-1], bounds[1:], strict=True)
        return [row for row in rows if row[2] < row[3]]

    def difference(self, other: "ParameterTable") -> str | None:
        """Describes the first difference of ``other`` from this table; None if they are equal."""
        mine, theirs = (
            dict(zip(self.names, self.shapes, strict=True)),
            dict(zip(other.names, other.shapes, strict=True)),
        )
        for name in self.names:
            if name not in theirs:
                return f"parameter {name!r} {mine[name]} is missing ({len(theirs)} parameters instead of {len(mine)})"
            if mine[name] != theirs[name]:
                return f"parameter {name!r} has shape {theirs[name]} instead of {mine[name]}"
        for name in other.names:
            if name not in mine:
                return f"parameter {name!r} {theirs[name]} is new ({len(theirs)} parameters instead of {len(mine)})"
        if self.names != other.names:
            return "the parameters are the same but come in another order"
        return None


def check_whole(model: nn.Module) -> None:
    """Checks that this process alone holds the model's parameters, whole.

    Raises:
        ModelError: if the model or a part of it is wrapped in DistributedDataParallel or FullyShardedDataParallel, or
            changed by ``fully_shard`` or ``replicate``; if a parameter is a DTensor; or if it is lazy, without a shape.
    """
    for module in model.modules():
        bases = [base.__module__ for base in type(module).__mro__]
        if any(base.startswith(_REPLICATING) for base in bases):
            raise ModelError(
                f"the model is wrapped in {type(module).__name__}, whose ranks would step along different losses and "
                f"drift apart; pass the inner module (`model.module`), and return the mean of the ranks' losses from "
                f"the loss function or closure (torch.distributed.all_reduce)"
            )
        if any(base.startswith(_SHARDING) for base in bases):
            raise ModelError(
                f"the model is sharded over processes ({type(module).__name__}), so an element id means another weight "
                f"on every rank; use a model that every process holds whole"
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ModelError(f"parameter {name!r} has no shape yet; run the model once to initialize it")
        if any(base.__name__ == "DTensor" for base in type(parameter).__mro__) or hasattr(parameter, "_is_flat_param"):
            raise ModelError(
                f"parameter {name!r} is sharded over processes ({type(parameter).__name__}); use a model that every "
                f"process holds whole"
            )


def check_values(name: str, parameter: nn.Parameter) -> None:
    """Checks that the values of a parameter can be read, written (or written beside it), and differentiated.

    Raises:
        ModelError: if the parameter is on the meta device (not loaded, or offloaded), was made in inference mode, or is
            of a subclass of tensors, such as packed weights.
    """
    if isinstance(parameter, FrozenWeight):
        return
    if parameter.device.type == "meta":
        raise ModelError(
            f"parameter {name!r} is on the meta device, so it has no values; load the weights first, and do not offload"
        )
    if parameter.is_inference():
        raise ModelError(
            f"parameter {name!r} was made in inference mode, so it can be neither changed nor differentiated; build or "
            f"load the model outside torch.inference_mode()"
        )
    if type(parameter.detach()) is not Tensor:
        raise ModelError(
            f"parameter {name!r} is a {type(parameter.detach()).__name__} and not a plain tensor; leave it out of the "
            f"mask (requires_grad_(False)), or load the model with plain, unpacked weights"
        )


def fingerprint(model: nn.Module, *, rounded: bool = False) -> str:
    """Computes SHA-256 over name, dtype, shape and bytes of all that a model consists of, in hexadecimal.

    These are the parameters with element ids, then those without (such as int8 weights), then the buffers that
    ``state_dict`` holds (such as running means; not those that are computed from the configuration). Of a frozen
    parameter it is the dense weight, so the fingerprint is that of the same model with plain weights, unless live
    values beside it are added to outputs and have more bits than the dense weight.

    Args:
        model: the model.
        rounded: whether to leave out the bits that the dense weights have no room for.

    Raises:
        ModelError: if a tensor has no bytes to read, as on the meta device.
    """
    return _digest(chain.from_iterable(_tensors_by_kind(model).values()), rounded=rounded)


def fingerprint_by_kind(model: nn.Module) -> dict[str, str]:
    """Computes a fingerprint for each kind of tensors by its name: two models of one fingerprint have equal ones here.

    Raises:
        ModelError: see ``fingerprint``.
    """
    return {kind: _digest(tensors) for kind, tensors in _tensors_by_kind(model).items()}


def _tensors_by_kind(model: nn.Module) -> dict[str, Iterable[tuple[str, Tensor]]]:
    """Tensors that a fingerprint covers, in its order: (name, tensor) by kind."""
    return {
        "floating-point parameters": floating_parameters(model),
        "other parameters": ((name, p) for name, p in model.named_parameters() if not p.is_floating_point()),
        "buffers": _saved_buffers(model),
    }


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterates over the buffers that ``state_dict`` holds: (name, buffer)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(prefix, recurse=False, remove_duplicate=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _digest(tensors: Iterable[tuple[str, Tensor]], *, rounded: bool = False) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        try:
            digest.update(_bytes_of(tensor.detach()))
            if not rounded and isinstance(tensor, FrozenWeight) and tensor.has_wide_values():
                assert tensor.values is not None
                digest.update(_bytes_of(tensor.values))
        except (RuntimeError, TypeError) as error:  # meta, sparse and quantized tensors, wrappers such as DTensor
            raise ModelError(
                f"the model has no fingerprint: the values of {name!r} ({tensor.dtype} on {tensor.device}) cannot be "
                f"read ({str(error).partition(chr(10))[0]}); load the model with plain tensors, all on their devices"
            ) from error
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.contiguous().cpu().resolve_conj().resolve_neg()
    return memoryview(plain.reshape(plain.numel()).view(torch.uint8).numpy())  # type: ignore[arg-type]


__all__ = ["ParameterTable", "check_values", "check_whole", "fingerprint", "fingerprint_by_kind", "floating_parameters"]
