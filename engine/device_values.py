"""``DeviceValues``: seeds, scales and learning rates in the memory of a device, put there without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..triton_kernels.reference import wrap_seed
from .stream import check_seed

# Values kept, at most. A step uses a handful; seeds come in batches.
_KEEP = 1024


def to_device_async(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device; the host does not wait for what the device is doing."""
    if device.type == "cuda":
        values = values.pin_memory()  # from pageable memory the copy would wait
    return values.to(device, non_blocking=True)


class DeviceValues:
    """Small constant tensors on one device; what was put there lately is found again.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[object, Tensor] = {}

    def seed(self, seed: int) -> Tensor:
        """A seed in [0, 2**64) as the operations take it: int64 [1], its 64 bits."""
        return self._kept[seed] if seed in self._kept else self.seeds([seed])

    def seeds(self, seeds: Sequence[int]) -> Tensor:
        """Seeds in [0, 2**64) as the operations take them: int64 [n]; ``seed`` finds each of them then.

        Raises:
            ValueError: for a seed out of range.
        """
        of_device = self._put([wrap_seed(check_seed(seed)) for seed in seeds], torch.int64)
        for i, seed in enumerate(seeds[-_KEEP:], start=max(0, len(seeds) - _KEEP)):
            self._keep(seed, of_device[i : i + 1])
        return of_device

    def numbers(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Numbers rounded to a dtype: [n]."""
        key = (dtype, *map(repr, values))  # -0.0 equals 0.0, and is another number here
        if key not in self._kept:
            self._keep(key, self._put(values, dtype))
        return self._kept[key]

    def _put(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return to_device_async(torch.tensor(values, dtype=dtype), self.device)

    def _keep(self, key: object, value: Tensor) -> None:
        if len(self._kept) >= _KEEP:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = value


__all__ = ["DeviceValues", "to_device_async"]
