"""``Clock``: time stamps on a device's time line, recorded without waiting for the device."""

import time
from typing import Any

import torch


class Clock:
    """Measures the time between two points of a device's work.

    Args:
        device: device to measure. CUDA and ROCm use events of the current stream; all others use the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def now(self) -> Any:
        """Returns a time stamp. On a GPU it is the time at which the work queued so far is finished.

        None while a CUDA graph is recorded: there is no such time.
        """
        if self._device is None:
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Returns the seconds between two time stamps. On a GPU, waits for the later one."""
        if self._device is None:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


__all__ = ["Clock"]
