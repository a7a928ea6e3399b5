"""The element ids of a model: its parameters in order, each with the id of its first element; and fingerprints.

Shared tensors count once, in the order met; only floating-point tensors count.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def floating_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that have element ids, in id order."""
    return ((name, p) for name, p in model.named_parameters() if p.is_floating_point())


@dataclass(frozen=True)
class ParameterTable:
    """Name, shape and base id of every parameter that has element ids.

    Args:
        names: as in ``model.named_parameters()``.
        shapes: of each.
        bases: id of each one's first element.
        size: ``d``, the number of elements.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bases: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterTable":
        """The table of a model."""
        names, shapes, bases, size = [], [], [], 0
        for name, parameter in floating_parameters(model):
            names.append(name)
            shapes.append(tuple(parameter.shape))
            bases.append(size)
            size += parameter.numel()
        return cls(tuple(names), tuple(shapes), tuple(bases), size)

    def to_json(self) -> str:
        """One line of JSON: a list of [name, shape, base id]."""
        rows = zip(self.names, self.shapes, self.bases, strict=True)
        return json.dumps([[name, list(shape), base] for name, shape, base in rows], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "ParameterTable":
        """Inverse of ``to_json``.

        Raises:
            ValueError: if the text is anything else than ``to_json`` writes; base ids that are no running sum of the
                sizes would let ids point outside a tensor.
        """
        try:
            rows = [(name, tuple(shape), base) for name, shape, base in json.loads(text)]
        except (TypeError, RecursionError) as error:
            raise ValueError(f"the table is no list of [name, shape, base id]: {error}") from error
        names: list[str] = []
        bases: list[int] = []
        size = 0
        for name, shape, base in rows:
            if not isinstance(name, str) or any(type(n) is not int or n < 0 for n in shape):
                raise ValueError(f"the table's row {name!r} has no shape")
            if type(base) is not int or base != size:
                raise ValueError(f"the table's row {name!r} begins at {base} instead of {size}")
            names.append(name)
            bases.append(base)
            size += math.prod(shape)
        if size >= 2**63:
            raise ValueError(f"the table has {size} elements, and element ids end at {2**63 - 1}")
        if len(set(names)) < len(names):
            raise ValueError("the table has a parameter twice")
        return cls(tuple(names), tuple(shape for _, shape, _ in rows), tuple(bases), size)

    @property
    def digest(self) -> str:
        """SHA-256 of the table, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def ranges(self, ids: Tensor) -> list[tuple[str, int, int, int]]:
        """Name, base id, begin and end in ``ids`` of every parameter that some of the ascending ids lie in."""
        bounds = torch.searchsorted(ids, torch.tensor([*self.bases, self.size])).tolist()
        rows = zip(self.names, self.bases, bounds[:-1], bounds[1:], strict=True)
        return [row for row in rows if row[2] < row[3]]

    def difference(self, other: "ParameterTable") -> str | None:
        """What ``other`` has that this has not, in words; None if they are equal."""
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
    """SHA-256 over name, dtype, shape and bytes of every parameter with element ids, in hexadecimal."""
    digest = hashlib.sha256()
    for name, parameter in floating_parameters(model):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(_bytes_of(parameter.detach()))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


__all__ = ["ParameterTable", "fingerprint", "floating_parameters"]
