"""Checks of ``SparseZO``'s parameter groups."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .estimator import check_eps
from .parameters import floating_parameters

# Hyperparameters of torch's other optimizers that would change an update. Zeroth-order steps have none of them.
_UNSUPPORTED = (
    "alpha", "amsgrad", "betas", "centered", "dampening", "decoupled_weight_decay", "etas", "lambd", "lr_decay",
    "maximize", "momentum", "nesterov", "rho", "step_sizes", "weight_decay",
)  # fmt: skip


def group_numbers(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the number of each parameter's group by the parameter's name.

    Args:
        model: the model.
        groups: the optimizer's parameter groups.

    Raises:
        ValueError: if a group has a parameter that the model does not have, or a hyperparameter without effect.
    """
    names = {id(p): name for name, p in floating_parameters(model)}
    numbers = {}
    for number, group in enumerate(groups):
        for key in _UNSUPPORTED:
            value = group.get(key)
            if any(value) if isinstance(value, tuple | list) else value:
                raise ValueError(f"parameter group {number} has {key}={value!r}, which zeroth-order steps do not have")
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(f"parameter group {number} has a tensor {list(p.shape)} that the model does not have")
            numbers[names[id(p)]] = number
    return numbers


def check_masked(model: nn.Module, masked: Iterable[str], numbers: Mapping[str, int], *, frozen: bool) -> None:
    """Checks the parameters with masked elements.

    Args:
        model: the model.
        masked: names of the parameters.
        numbers: see ``group_numbers``.
        frozen: whether parameters that do not require gradients may be trained.

    Raises:
        ValueError: if one is in no group, or is frozen although ``frozen`` is false.
    """
    parameters = dict(floating_parameters(model))
    for name in masked:
        if name not in numbers:
            raise ValueError(f"parameter {name!r} has masked elements and is in no parameter group")
        if not frozen and not parameters[name].requires_grad:
            raise ValueError(
                f"parameter {name!r} has masked elements and is frozen (requires_grad=False); make a mask without it, "
                f"or pass frozen=True to train it nevertheless"
            )


def check_lr(lr: float | Tensor) -> float:
    """Returns the learning rate as a float; raises ``ValueError`` unless it is finite and not negative."""
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be finite and not negative, got {lr}")
    return float(lr)


def common_eps(groups: Sequence[Mapping[str, Any]]) -> float:
    """Returns the eps of all groups.

    Raises:
        ValueError: if the groups have different ones, or eps is out of range.
    """
    eps: float = groups[0]["eps"]
    for number, group in enumerate(groups):
        if group["eps"] != eps:
            raise ValueError(
                f"all parameter groups must have the same eps: group {number} has {group['eps']}, group 0 has {eps}"
            )
    check_eps(eps)
    return eps


__all__ = ["check_lr", "check_masked", "common_eps", "group_numbers"]
