"""CUDA graphs: work of a GPU that is recorded once and repeated by one launch."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch


class Graphs(Protocol):
    """Records work of a device, so that it can be repeated by one launch."""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """Records what ``body`` launches, without running it. Returns a function that runs it."""


class CudaGraphs:
    """CUDA graphs that share one memory pool.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None  # torch's own belongs to the GPU that was captured first

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """See ``Graphs``. The host waits for the device first."""
        # The outer context brings the stream back where torch does not, after a capture that failed. In thread_local
        # mode other threads, such as data loaders, may pin memory meanwhile.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._stream = self._stream or torch.cuda.Stream()
            graph, failure = torch.cuda.CUDAGraph(), None
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                    try:
                        body()
                    except Exception as error:
                        failure = error
            except RuntimeError as error:  # from the end of a capture that failed; it does not say why
                self._clean_up()
                raise failure or error from None
            if failure is not None:
                raise failure
        return graph.replay

    def _clean_up(self) -> None:
        """Ends what torch leaves behind when a capture fails.

        The allocator goes on as if it were captured (torch before 2.12), and so does the random generator, until the
        end of another capture.
        """
        with suppress(RuntimeError):  # it has ended
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), None, self._stream):
            torch.zeros(1, dtype=torch.float32, device=self._device)


__all__ = ["CudaGraphs", "Graphs"]
