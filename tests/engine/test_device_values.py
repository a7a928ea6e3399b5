"""The cache of seeds and scales in device memory."""

import torch

from meerkat_engine.engine.device_values import DeviceValues


def test_zero_and_negative_zero_are_cached_separately() -> None:
    values = DeviceValues(torch.device("cpu"))
    assert [values.numbers([x], torch.float32).signbit().item() for x in (0.0, -0.0, 0.0)] == [False, True, False]


def test_the_same_number_is_cached_separately_for_each_dtype() -> None:
    values = DeviceValues(torch.device("cpu"))
    assert values.numbers([0.1], torch.float32).dtype is torch.float32
    assert values.numbers([0.1], torch.float64).dtype is torch.float64
