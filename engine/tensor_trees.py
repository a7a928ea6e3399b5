"""Trees of tensors: tuples, lists, mappings and dataclasses that hold tensors and constants, in any depth."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

# Values that are compared, not copied. Their types are part of a tree's shape, because 1 == 1.0 == True.
_CONSTANTS = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, type(None))


def tensors_and_shape(tree: Any) -> tuple[list[Tensor], Hashable]:
    """Returns the tensors of a tree, and everything else about it.

    Returns:
        tensors: the tensors, in order.
        shape: equal for two trees that differ in nothing but the values of their tensors: containers, keys, constants,
            and each tensor's shape, strides, dtype and device.

    Raises:
        TypeError: if a part of the tree is neither a container, a dense tensor nor a constant.
    """
    tensors: list[Tensor] = []
    return tensors, _shape(tree, tensors)


def _shape(tree: Any, tensors: list[Tensor]) -> Hashable:
    if isinstance(tree, Tensor):
        if tree.layout is not torch.strided:
            raise TypeError(f"its inputs hold a tensor of layout {tree.layout}; they may be dense tensors")
        tensors.append(tree)
        return tree.shape, tree.stride(), tree.dtype, tree.device
    if isinstance(tree, _CONSTANTS):
        return type(tree), repr(tree) if isinstance(tree, float) else tree  # 0.0 == -0.0, and NaN equals nothing
    if isinstance(tree, tuple | list):
        return type(tree), *(_shape(part, tensors) for part in tree)
    if isinstance(tree, Mapping):
        return type(tree), *((key, _shape(part, tensors)) for key, part in tree.items())
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return type(tree), *(_shape(getattr(tree, name), tensors) for name in _fields(tree))
    raise TypeError(
        f"its inputs hold a {type(tree).__name__}; they may be tensors, constants, and tuples, lists, mappings and "
        f"dataclasses of these"
    )


def replace_tensors(tree: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of a tree in which each tensor is replaced, in the order of ``tensors_and_shape``."""
    if isinstance(tree, Tensor):
        return replace(tree)
    if isinstance(tree, _CONSTANTS):
        return tree
    if isinstance(tree, tuple | list):
        parts = [replace_tensors(part, replace) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, Mapping):
        items = {key: replace_tensors(part, replace) for key, part in tree.items()}
        return items if type(tree) is dict else type(tree)(items)  # type: ignore[call-arg]
    copy = object.__new__(type(tree))  # not by its constructor, which may compute something from the tensors
    for name in _fields(tree):
        object.__setattr__(copy, name, replace_tensors(getattr(tree, name), replace))
    return copy


def _fields(tree: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(tree)]


__all__ = ["replace_tensors", "tensors_and_shape"]
