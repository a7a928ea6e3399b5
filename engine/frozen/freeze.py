"""Replaces the parameters of a model by frozen ones."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .points import Points
from .stored import PlainStored, Stored
from .weight import FrozenWeight

# Makes the stored values of a parameter from its name and its values.
Storing = Callable[[str, Tensor], Stored]


def freeze(
    model: nn.Module,
    store: Storing = lambda _, values: PlainStored(values),
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    adds: bool = False,
    rounds: bool = False,
) -> None:
    """Replaces every floating-point parameter of a model by a frozen one, one after the other.

    Memory: the stored values, and the values of one parameter. Tied parameters stay tied.

    Args:
        model: the model.
        store: makes the stored values of each parameter.
        dtype: dtype in which the model computes; None: each parameter's own.
        device: device on which the model computes; None: each parameter's own.
        adds: see ``FrozenWeight``.
        rounds: see ``FrozenWeight``.

    Raises:
        ModelError: if a parameter is read-only already.
    """
    points = Points()
    places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name, _ in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for own_name, parameter in module._parameters.items():
            if parameter is not None:
                places[names[parameter]].append((module, own_name))
    del names
    for name, of_name in places.items():
        parameter = of_name[0][0]._parameters[of_name[0][1]]
        if parameter is None or not parameter.is_floating_point():
            continue
        if isinstance(parameter, FrozenWeight):
            raise ModelError(f"parameter {name!r} is read-only already; load the model again to keep it in another way")
        frozen = FrozenWeight(
            store(name, parameter.detach()),
            dtype or parameter.dtype,
            device or parameter.device,
            points,
            adds=adds,
            rounds=rounds,
        )
        for module, own_name in of_name:
            module._parameters[own_name] = frozen  # type: ignore[assignment]


def thaw(module: nn.Module) -> None:
    """Replaces the frozen parameters of a module, not those of its submodules, by plain ones that can be written."""
    for name, parameter in module._parameters.items():
        if isinstance(parameter, FrozenWeight):
            module._parameters[name] = nn.Parameter(parameter.dense(), requires_grad=False)


__all__ = ["Storing", "freeze", "thaw"]
