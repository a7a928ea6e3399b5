"""Trees of tensors: what is compared, what is replaced."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from meerkat_engine.engine.tensor_trees import replace_tensors, tensors_and_shape

Pair = namedtuple("Pair", "a b")
X = torch.arange(6.0).view(2, 3)


@dataclass(frozen=True)
class Inner:
    x: Tensor
    size: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "made", [])


@dataclass(frozen=True, slots=True)
class Outer:
    inner: Inner
    parts: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class WithCache:
    x: Tensor

    @cached_property
    def total(self) -> float:
        return float(self.x.sum())


TREES = [
    X, (X, 1), [X, None], {"a": X, "b": "text"}, Pair(X, X), Outer(Inner(X), [X, {"c": X}]), OrderedDict(a=X),
    BatchEncoding({"input_ids": X}), (), {"n": torch.float32, "d": torch.device("cpu")},
]  # fmt: skip


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: type(tree).__name__)
def test_tensors_are_replaced_in_order_and_nothing_else_changes(tree: Any) -> None:
    tensors, shape = tensors_and_shape(tree)
    new = [torch.full_like(t, i) for i, t in enumerate(tensors)]
    own = iter(new)
    copy = replace_tensors(tree, lambda _: next(own))
    assert type(copy) is type(tree)
    found, same_shape = tensors_and_shape(copy)
    assert all(a is b for a, b in zip(found, new, strict=True))
    assert same_shape == shape
    assert hash(same_shape) == hash(shape)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (X, X[:1]), (X, X.int()), (X, X.t().contiguous().t()), (X, (X,)), ((X,), [X]), ({"a": X}, {"b": X}), (1, True),
        (1, 1.0), (0.0, -0.0), ((X, None), (X, 0)), (Inner(X), Inner(X, 4)), (Inner(X), WithCache(X)),
        (X, X.to("meta")), ("1", 1),
    ],
    ids=str,
)  # fmt: skip
def test_trees_that_differ_in_anything_but_values_have_other_shapes(a: Any, b: Any) -> None:
    assert tensors_and_shape(a)[1] != tensors_and_shape(b)[1]
    assert tensors_and_shape(a)[1] == tensors_and_shape(a)[1]


def test_values_are_no_part_of_the_shape() -> None:
    assert tensors_and_shape((X, 2))[1] == tensors_and_shape((X + 1, 2))[1]


def test_what_a_dataclass_has_computed_is_not_taken_over() -> None:
    tree = WithCache(X)
    assert tree.total == 15
    assert replace_tensors(tree, lambda x: x * 2).total == 30


@pytest.mark.parametrize("part", [object(), {1, 2}, Inner], ids=["object", "set", "class"])
def test_other_parts_are_refused(part: object) -> None:
    with pytest.raises(TypeError, match="its inputs hold a"):
        tensors_and_shape((X, [part]))
