"""Measures times over cold caches, peak memory, copy bandwidth and the cost of a kernel launch."""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.clock import Clock

_CPU_FLUSH = 128 << 20  # bytes; more than the last-level cache of common processors
_COPY = 256 << 20  # bytes copied to measure the bandwidth
# How long a GPU is kept busy before an action, in seconds, so that the host is ahead of it.
_LEAST_LEAD, _MOST_LEAD = 1e-3, 50e-3


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, 20th and 80th percentile of repeated measurements."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Returns the spread of ``values``, at least two."""
        cuts = statistics.quantiles(values, n=5, method="inclusive")
        return cls(median=statistics.median(values), p20=cuts[0], p80=cuts[3])


@dataclass(frozen=True, kw_only=True)
class Moments:
    """When an action started and ended on its device, and how long the host took to start it, in seconds."""

    start: Any
    end: Any
    host: float


class Stopwatch:
    """Measures the time of actions on one device, with cold or warm caches.

    On a GPU the measured time of ``cold`` is the device's alone: it is kept busy before the action, at least a
    millisecond and twice as long as the host took for the slowest action so far (at most 50 milliseconds), so that all
    launches are queued when the action's first one starts.

    Args:
        device: the device of the actions.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clock = Clock(device)
        self._lead = _LEAST_LEAD
        size = _CPU_FLUSH
        if device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flush_buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def cold(self, action: Callable[[], object]) -> Moments:
        """Flushes the caches, then runs an action with the host ahead of a GPU."""
        self._flush_buffer.add_(1)
        if self._device.type == "cuda":
            torch.cuda._sleep(int(self._lead * _cycles_per_second(self._device)))
        moments = self.warm(action)
        self._lead = min(max(self._lead, 2 * moments.host), _MOST_LEAD)
        return moments

    def warm(self, action: Callable[[], object]) -> Moments:
        """Runs an action; on a GPU the time includes waits for the host."""
        start, started = self._clock.now(), time.perf_counter()
        action()
        host = time.perf_counter() - started
        return Moments(start=start, end=self._clock.now(), host=host)

    def seconds(self, moments: Moments) -> float:
        """Returns the seconds between start and end on the device; waits for the end."""
        return self._clock.seconds(moments.start, moments.end)


@functools.cache
def _cycles_per_second(device: torch.device) -> float:
    """Returns the rate of the counter by which ``torch.cuda._sleep`` counts."""
    cycles, clock = 20_000_000, Clock(device)
    for _ in range(2):  # the first time wakes the GPU
        start = clock.now()
        torch.cuda._sleep(cycles)
        seconds = clock.seconds(start, clock.now())
    return cycles / seconds


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Discards the process's standard error: the profiler's library writes two lines to it at every start and stop."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Returns the peak memory that an action allocates, in bytes, on top of what was allocated before it."""
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
    allocated = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        allocated += change.nbytes()
        peak = max(peak, allocated)
    return peak


def copy_bandwidth(device: torch.device) -> float:
    """Returns the bytes per second, read plus written, of a copy too large for the caches."""
    source = torch.ones(_COPY // 4, dtype=torch.int32, device=device)
    target, watch = torch.empty_like(source), Stopwatch(device)
    seconds = [watch.seconds(watch.cold(lambda: target.copy_(source))) for _ in range(6)][1:]
    return 2 * _COPY / statistics.median(seconds)


def empty_launch(device: torch.device) -> float | None:
    """Returns the time of a kernel that does nothing, in seconds; None on a CPU."""
    if device.type != "cuda":
        return None
    from .empty_kernel import empty_kernel  # triton exists for Linux only

    x: Tensor = torch.zeros(1, dtype=torch.float32, device=device)
    watch = Stopwatch(device)
    seconds = [watch.seconds(watch.cold(lambda: empty_kernel[(1,)](x))) for _ in range(21)][1:]
    return statistics.median(seconds)


__all__ = ["Spread", "Stopwatch", "copy_bandwidth", "empty_launch", "peak_bytes"]
