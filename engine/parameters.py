"""Element ids and fingerprints of a model. Parameters are numbered in order, each from the id of its first element.

A shared tensor counts once, at its first occurrence. Only floating-point tensors count.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
        """Builds the table of a model."""
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

    @property
    def digest(self) -> str:
        """SHA-256 of the table, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def ranges(self, ids: Tensor) -> list[tuple[str, int, int, int]]:
        """Locates each parameter's elements in ascending ids: (name, base id, start, stop), in id order.

        Only parameters that contain some of the ids are listed. Their ids are ``ids[start:stop]``.
        """
        bounds = torch.searchsorted(ids, torch.tensor([*self.bases, self.size])).tolist()
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


def fingerprint(model: nn.Module) -> str:
    """Computes SHA-256 over name, dtype, shape and bytes of every parameter with element ids, in hexadecimal."""
    digest = hashlib.sha256()
    for name, parameter in floating_parameters(model):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(_bytes_of(parameter.detach()))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


__all__ = ["ParameterTable", "fingerprint", "floating_parameters"]
