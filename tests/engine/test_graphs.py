"""What a CUDA graph's recording does around torch's calls, which are imitated."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from meerkat_engine.engine.graphs import CudaGraphs


class Calls:
    """Imitates ``torch.cuda.graph``: after a failure in it, its end raises and the stream stays the capture's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.captures, self.ended = "main", 0, []
        self.is_invalid = self.still_allocating = False
        for name, value in {
            "device": lambda _: nullcontext(), "current_device": lambda: 0, "current_stream": lambda _: self.stream,
            "stream": self._stream, "graph_pool_handle": lambda: "pool", "CUDAGraph": self.Graph, "graph": self._graph,
            "Stream": lambda: "capture",
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end, raising=False)
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)

    class Graph:
        def replay(self) -> str:
            return "replayed"

    @contextmanager
    def _stream(self, stream: str) -> Iterator[None]:
        before = self.stream
        self.stream = stream
        yield
        self.stream = before

    @contextmanager
    def _graph(self, graph: object, pool: str, stream: str, capture_error_mode: str = "global") -> Iterator[None]:
        assert not self.still_allocating, "captures_underway.empty() INTERNAL ASSERT FAILED"
        self.captures += 1
        self.stream = stream
        yield
        if self.is_invalid:
            self.is_invalid, self.still_allocating = False, True
            raise RuntimeError("operation failed due to a previous error during capture")
        self.stream = "main"

    def _end(self, device: int, pool: str) -> None:
        assert pool == "pool"
        self.ended.append(device)
        if not self.still_allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.still_allocating = False

    def invalid(self) -> None:
        self.is_invalid = True
        raise RuntimeError("operation not permitted when stream is capturing")

    def python_error(self) -> None:
        raise ValueError("no CUDA error")

    def late_error(self) -> None:
        self.is_invalid = True


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def test_a_recording_returns_its_replay(calls: Calls) -> None:
    ran = []
    assert CudaGraphs(torch.device("cuda")).record(lambda: ran.append(calls.stream))() == "replayed"  # type: ignore[func-returns-value]
    assert ran == ["capture"]
    assert (calls.captures, calls.ended) == (1, [])


@pytest.mark.parametrize(
    ("body", "error", "message", "captures"),
    [
        ("invalid", RuntimeError, "^operation not permitted when stream is capturing$", 2),
        ("python_error", ValueError, "^no CUDA error$", 1),
        ("late_error", RuntimeError, "^operation failed due to a previous error during capture$", 2),
    ],
)
def test_a_failed_recording_says_why_and_leaves_nothing_behind(
    calls: Calls, body: str, error: type[Exception], message: str, captures: int
) -> None:
    """torch raises another error at the end, keeps the stream, and keeps its allocator recording."""
    graphs = CudaGraphs(torch.device("cuda"))
    with pytest.raises(error, match=message):
        graphs.record(getattr(calls, body))
    assert calls.stream == "main"
    assert calls.captures == captures  # with the one that cleans up
    assert graphs.record(lambda: None)() == "replayed"  # type: ignore[func-returns-value]
