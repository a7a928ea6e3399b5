"""Seeds and scales in the memory of a device."""

import torch

from meerkat_engine.engine.device_values import DeviceValues


def test_equal_numbers_with_other_bits_are_kept_apart() -> None:
    values = DeviceValues(torch.device("cpu"))
    assert [values.numbers([x], torch.float32).signbit().item() for x in (0.0, -0.0, 0.0)] == [False, True, False]


def test_numbers_of_one_value_and_another_dtype_are_kept_apart() -> None:
    values = DeviceValues(torch.device("cpu"))
    assert values.numbers([0.1], torch.float32).dtype is torch.float32
    assert values.numbers([0.1], torch.float64).dtype is torch.float64
