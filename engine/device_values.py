"""``DeviceValues``: seeds, scales and learning rates in device memory, copied without waiting for the device."""

from array import array
from collections.abc import Sequence
from typing import Any

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

    They may be used on any CUDA stream: a stream waits for values that were sent on another one.

    Args:
        device: device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Each with the stream that it was sent on and the event after it; None on other devices than GPUs.
        self._cache: dict[object, tuple[Tensor, Any, Any]] = {}

    def seed(self, seed: int) -> Tensor:
        """Returns the tensor of one seed in [0, 2**64) for the operations: int64 [1] with its 64 bits.

        Raises:
            ValueError: if the seed is out of range.
            RuntimeError: if it is not on the device yet and a CUDA graph is being captured, here and in ``numbers``.
        """
        if seed not in self._cache:
            self.seeds([seed])
        return self._cached(seed)

    def seeds(self, seeds: Sequence[int]) -> Tensor:
        """Sends several seeds in one transfer, and caches each of them for ``seed``.

        Args:
            seeds: n seeds in [0, 2**64).

        Returns:
            int64 [n] with the seeds' 64 bits.

        Raises:
            ValueError: if a seed is out of range.
            RuntimeError: if a CUDA graph is being captured.
        """
        on_device, stream, event = self._send([wrap_seed(check_seed(seed)) for seed in seeds], torch.int64)
        for i, seed in enumerate(seeds[-_CACHE_SIZE:], start=max(0, len(seeds) - _CACHE_SIZE)):
            self._store(seed, (on_device[i : i + 1], stream, event))
        return on_device

    def numbers(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Returns a tensor of numbers rounded to a dtype: [n]."""
        key = dtype, array("d", values).tobytes()  # bytes keep -0.0 and 0.0 apart, which compare equal
        if key not in self._cache:
            self._store(key, self._send(values, dtype))
        return self._cached(key)

    def _send(self, values: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, Any, Any]:
        stream = None
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"nothing can be sent while a CUDA graph is captured, and {values[0]} is not on the device yet: "
                    f"use it once before the capture"
                )
            stream = torch.cuda.current_stream(self.device)
        on_device = to_device_async(torch.tensor(values, dtype=dtype, device="cpu"), self.device)
        return on_device, stream, None if stream is None else stream.record_event()

    def _cached(self, key: object) -> Tensor:
        value, sent_on, event = self._cache[key]
        if sent_on is not None and not torch.cuda.is_current_stream_capturing():  # all was sent before a capture
            stream = torch.cuda.current_stream(self.device)
            if stream != sent_on:
                stream.wait_event(event)
                value.record_stream(stream)  # its memory is not reused before this stream has read it
        return value

    def _store(self, key: object, value: tuple[Tensor, Any, Any]) -> None:
        if len(self._cache) >= _CACHE_SIZE:
            del self._cache[next(iter(self._cache))]  # the oldest
        self._cache[key] = value


__all__ = ["DeviceValues", "to_device_async"]
