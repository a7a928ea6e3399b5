"""The cache of seeds and scales in device memory."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meerkat_engine.engine import device_values
from meerkat_engine.engine.device_values import DeviceValues


def test_zero_and_negative_zero_are_cached_separately() -> None:
    values = DeviceValues(torch.device("cpu"))
    assert [values.numbers([x], torch.float32).signbit().item() for x in (0.0, -0.0, 0.0)] == [False, True, False]


def test_the_same_number_is_cached_separately_for_each_dtype() -> None:
    values = DeviceValues(torch.device("cpu"))
    assert values.numbers([0.1], torch.float32).dtype is torch.float32
    assert values.numbers([0.1], torch.float64).dtype is torch.float64


class Stream:
    """Imitates a CUDA stream: notes which events it waits for."""

    def __init__(self, name: str) -> None:
        self.name, self.waited = name, []

    def record_event(self) -> str:
        return f"after the copy on {self.name}"

    def wait_event(self, event: str) -> None:
        self.waited.append(event)


class Device:
    """Imitates a GPU for ``DeviceValues``: the current stream, captures, and which tensors each stream keeps alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.capturing = Stream("main"), False
        self.sent: list[list[float]] = []
        self.kept: list[tuple[float, str]] = []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda v, s: self.kept.append((v.item(), s.name)))
        monkeypatch.setattr(device_values, "to_device_async", self._send)
        self.values = DeviceValues(SimpleNamespace(type="cuda"))  # type: ignore[arg-type]

    def _send(self, values: torch.Tensor, device: Any) -> torch.Tensor:
        self.sent.append(values.tolist())
        return values


def test_a_stream_waits_for_values_that_were_sent_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(monkeypatch)
    main, side = gpu.current, Stream("side")
    gpu.values.seeds([3, 4])
    assert gpu.values.seed(4).item() == 4
    gpu.values.numbers([0.5], torch.float32)
    assert main.waited == []
    gpu.current = side
    assert gpu.values.seed(4).item() == 4
    assert gpu.values.numbers([0.5], torch.float32).item() == 0.5
    assert side.waited == ["after the copy on main"] * 2
    assert gpu.kept == [(4, "side"), (0.5, "side")]
    gpu.values.seed(7)
    gpu.current = main
    gpu.values.seed(7)
    assert main.waited == ["after the copy on side"]
    assert gpu.sent == [[3, 4], [0.5], [7]]


def test_nothing_is_sent_and_nothing_is_waited_for_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(monkeypatch)
    gpu.values.seed(3)
    gpu.current, gpu.capturing = Stream("capturing"), True
    assert gpu.values.seed(3).item() == 3
    assert gpu.current.waited == []
    for use in (lambda: gpu.values.seed(4), lambda: gpu.values.numbers([0.5], torch.float32)):
        with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured.*use it once before"):
            use()
    assert gpu.sent == [[3]]
