"""``DeviceValues``: seeds, scales and learning rates in device memory, copied without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..triton_kernels.reference import wrap_seed
from .stream import check_seed

# Maximum number of cached tensors. A step uses a handful; seeds arrive in batches.
_CACHE_SIZE = 1024


def to_device_async(values: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device; the host does not wait for the device's current work."""
    if device.type == "cuda":
        values = values.pin_memory()  # a copy from pageable memory would wait
    return values.to(device, non_blocking=True)


class DeviceValues:
    """Small constant tensors on one device, with a cache of recently used ones.

    Args:
        device: device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cache: dict[object, Tensor] = {}

    def seed(self, seed: int) -> Tensor:
        """Returns the tensor of one seed in [0, 2**64) for the operations: int64 [1] with its 64 bits."""
        return self._cache[seed] if seed in self._cache else self.seeds([seed])

    def seeds(self, seeds: Sequence[int]) -> Tensor:
        """Sends several seeds in one transfer, and caches each of them for ``seed``.

        Args:
            seeds: n seeds in [0, 2**64).

        Returns:
            int64 [n] with the seeds' 64 bits.

        Raises:
            ValueError: if a seed is out of range.
        """
        on_device = self._send([wrap_seed(check_seed(seed)) for seed in seeds], torch.int64)
        for i, seed in enumerate(seeds[-_CACHE_SIZE:], start=max(0, len(seeds) - _CACHE_SIZE)):
            self._store(seed, on_device[i : i + 1])
        return on_device

    def numbers(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Returns a tensor of numbers rounded to a dtype: [n]."""
        key = (dtype, *map(repr, values))  # repr keeps -0.0 and 0.0 apart, which compare equal
        if key not in self._cache:
            self._store(key, self._send(values, dtype))
        return self._cache[key]

    def _send(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return to_device_async(torch.tensor(values, dtype=dtype, device="cpu"), self.device)

    def _store(self, key: object, value: Tensor) -> None:
        if len(self._cache) >= _CACHE_SIZE:
            del self._cache[next(iter(self._cache))]  # the oldest
        self._cache[key] = value


__all__ = ["DeviceValues", "to_device_async"]
