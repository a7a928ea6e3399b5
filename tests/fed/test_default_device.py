"""A program's default device and dtype do not reach into a federation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from meerkat_engine.fed import simulate
from meerkat_engine.fed.methods import Gradient
from meerkat_engine.fed.terms import Schedule

Make = Callable[..., Any]


@contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Context with another default device and dtype of torch."""
    before = torch.get_default_device(), torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(before[0])
        torch.set_default_dtype(before[1])


@pytest.mark.parametrize(
    "settings",
    [{"schedule": Schedule.COSINE, "rounds": 2, "queries": 2, "per_round": 2}, {"gradient": Gradient.BACKPROPAGATION}],
    ids=["scalars", "weights"],
)
@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)]
)
def test_default_device_and_dtype_change_no_bit(
    federation: Make, settings: dict[str, Any], device: str, dtype: torch.dtype
) -> None:
    expected, fed = federation(**settings), federation(**settings)
    lines = [result.record for result in simulate(expected.server, expected.clients, 2)]
    with defaults(device, dtype):
        assert [result.record for result in simulate(fed.server, fed.clients, 2)] == lines
    assert fed.weights == expected.weights
