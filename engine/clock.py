"""``Clock``: moments on a device's time line, taken without waiting for the device."""

import time
from typing import Any

import torch


class Clock:
    """Measures time between moments of one device.

    Args:
        device: CUDA or ROCm: its current stream's events; any other: the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def now(self) -> Any:
        """This moment: on a GPU, when it has done all it has been given so far."""
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """From one moment to a later one; on a GPU, waits until it is over."""
        if self._device is None:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


__all__ = ["Clock"]
