"""Elements that a mask may contain: by torch's convention those of the parameters that require gradients.

The rules that choose elements work on positions 0, 1, ... among the eligible elements, in id order; ``element_ids``
makes ids of them.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from .errors import MaskError
from .frozen.weight import FrozenWeight
from .parameters import ParameterTable, floating_parameters


def eligible_parameters(model: nn.Module, frozen: bool = False) -> dict[str, nn.Parameter]:
    """Returns the floating-point parameters that a mask may contain by name, in id order.

    Args:
        model: the model to make a mask for.
        frozen: whether parameters that do not require gradients can be masked too.

    Raises:
        MaskError: if there are none.
    """
    parameters = dict(floating_parameters(model))
    if not any(p.numel() for p in parameters.values()):
        raise MaskError(
            f"{type(model).__name__} has no floating-point parameters, and a mask needs at least one element; "
            f"check that this is the model that was meant, and that its weights are not quantized"
        )
    chosen = {name: p for name, p in parameters.items() if frozen or p.requires_grad}
    if not any(p.numel() for p in chosen.values()):
        if any(isinstance(p, FrozenWeight) for p in parameters.values()):
            raise MaskError(
                "the model's weights are read-only, with masked ones beside them; pass frozen=True to mask them"
            )
        raise MaskError(
            "no parameter of the model requires a gradient, so there is nothing to mask; call "
            "model.requires_grad_(True) to train them all, or pass frozen=True to mask frozen parameters too"
        )
    return chosen


def check_density(density: float) -> None:
    """Raises ``MaskError`` unless the density is in (0, 1]."""
    if not 0 < density <= 1:
        raise MaskError(f"density must be in (0, 1], got {density}")


def element_count(density: float, size: int) -> int:
    """Number of masked elements: ``k = round(u * n)``, at least 1.

    Args:
        density: ``u`` in (0, 1].
        size: ``n``, the number of elements that the mask may contain.

    Raises:
        MaskError: if the density is out of range.
    """
    check_density(density)
    return max(1, round(density * size))


def base_ids(table: ParameterTable, names: Collection[str]) -> list[int]:
    """Returns the base ids of the named parameters, in id order."""
    return [base for name, base in zip(table.names, table.bases, strict=True) if name in names]


def element_ids(table: ParameterTable, names: Collection[str], positions: Tensor) -> Tensor:
    """Makes ids of positions among the elements of the named parameters.

    Args:
        table: the model's parameter table.
        names: names of the parameters.
        positions: int64 [k] on the CPU, ascending, from 0 to the number of their elements - 1; changed in place.

    Returns:
        int64 [k], ascending: ``positions`` with the ids written into it.
    """
    sizes = [torch.Size(shape).numel() for name, shape in zip(table.names, table.shapes, strict=True) if name in names]
    bounds = torch.searchsorted(positions, torch.tensor(sizes, dtype=torch.int64, device="cpu").cumsum(0)).tolist()
    start = first = 0
    for base, size, stop in zip(base_ids(table, names), sizes, bounds, strict=True):
        positions[start:stop] += base - first
        start, first = stop, first + size
    return positions


def values_at_ids(tensors: Mapping[str, Tensor], table: ParameterTable, ids: Tensor) -> Tensor:
    """Gathers the values of chosen elements.

    Args:
        tensors: tensors by parameter name, each with the parameter's shape, for all parameters with chosen elements.
        table: the model's parameter table.
        ids: ascending element ids, int64 [k] on the CPU.

    Returns:
        Values at the ids, [k] on the CPU.
    """
    parts = [
        tensors[name].view(-1)[(ids[start:stop] - base).to(tensors[name].device)].cpu()
        for name, base, start, stop in table.ranges(ids)
    ]
    return torch.cat(parts)


__all__ = ["base_ids", "check_density", "element_count", "element_ids", "eligible_parameters", "values_at_ids"]
