"""Time over cold caches, peak memory, and what the machine can do at best."""

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.clock import Clock

_CPU_FLUSH = 128 << 20  # bytes; more than the last-level cache of common processors
_COPY = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of at least two values."""
        cuts = statistics.quantiles(values, n=5, method="inclusive")
        return cls(median=statistics.median(values), p20=cuts[0], p80=cuts[3])


class Stopwatch:
    """Times actions on one device, each after the caches have been filled with something else.

    On a GPU, emptying the cache keeps the device busy while the host goes on to launch the action: what is measured is
    the device's time, and the host's where it does not keep up.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = Clock(device)
        size = _CPU_FLUSH
        if device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self._filler = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def cold(self, action: Callable[[], object]) -> tuple[Any, Any]:
        """Runs an action over cold caches; its beginning and end."""
        self._filler.add_(1)
        return self.warm(action)

    def warm(self, action: Callable[[], object]) -> tuple[Any, Any]:
        """Runs an action; its beginning and end."""
        begin = self._clock.now()
        action()
        return begin, self._clock.now()

    def seconds(self, moments: tuple[Any, Any]) -> float:
        """Between a beginning and an end; waits for the end."""
        return self._clock.seconds(*moments)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler's library writes two lines to the standard error of the process at every start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Most memory that an action holds at a time beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    profile: Any = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _no_stderr():
        profile.start()
    try:
        action()
    finally:
        with _no_stderr():
            profile.stop()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    source = torch.ones(_COPY // 4, dtype=torch.int32, device=device)
    target, watch = torch.empty_like(source), Stopwatch(device)
    seconds = [watch.seconds(watch.cold(lambda: target.copy_(source))) for _ in range(6)][1:]
    return 2 * _COPY / statistics.median(seconds)


def empty_launch(device: torch.device) -> float | None:
    """Seconds on the device of a kernel that does nothing; None on a CPU."""
    if device.type != "cuda":
        return None
    from .empty_kernel import nothing_kernel  # triton is there on Linux only

    x: Tensor = torch.zeros(1, device=device)
    watch = Stopwatch(device)
    seconds = [watch.seconds(watch.cold(lambda: nothing_kernel[(1,)](x))) for _ in range(21)][1:]
    return statistics.median(seconds)


__all__ = ["Spread", "Stopwatch", "copy_bandwidth", "empty_launch", "peak_bytes"]
