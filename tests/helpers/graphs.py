"""CUDA graphs without a GPU: what a recording does and does not do, operation by operation."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from meerkat_engine import SparseZO
from meerkat_engine.engine.graphs import Graphs

_ATEN = torch.ops.aten
_READS = (_ATEN._local_scalar_dense.default, _ATEN.item.default, _ATEN.nonzero.default, _ATEN.equal.default)
_MASKED = ("perturb_", "restore_", "update_", "update_perturb_")


class _Recording(TorchDispatchMode):
    """Notes all operations of torch. Those that write do nothing, as while a stream is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in _READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            self.operations.append(lambda: func(*args, **kwargs))
            return kwargs.get("out", args[0])
        result = func(*args, **kwargs)
        if _memory(result).isdisjoint(_memory((args, kwargs))):  # a view shares what it is a view of
            self.operations.append(lambda: _write(result, func(*args, **kwargs)))
        return result


def _memory(tree: Any) -> set[int]:
    """Addresses of the memory of all tensors in a tree."""
    return {part.untyped_storage().data_ptr() for part in tree_flatten(tree)[0] if isinstance(part, Tensor)} - {0}


def _write(to: Any, values: Any) -> None:
    for own, value in zip(tree_flatten(to)[0], tree_flatten(values)[0], strict=True):
        if isinstance(own, Tensor):
            own.copy_(value)


class ImitatedGraphs(Graphs):
    """Records what a step does on the CPU, and repeats it on the same tensors: numbers that the host passed stay.

    The masked operations are recorded like kernels: they read seeds and scales when they run.

    Args:
        opt: the optimizer whose steps are recorded from now on.

    Attributes:
        recorded: number of recordings.
        replayed: number of replays.
    """

    def __init__(self, opt: SparseZO) -> None:
        self._groups = opt.weights._launch_groups
        self.recorded = self.replayed = 0
        opt._captured._graphs = self
        opt._waits = opt._check_immediately = False  # as on a GPU

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        recording = _Recording()
        with self._recorded_kernels(recording), recording:
            body()

        def replay() -> None:
            self.replayed += 1
            with torch.inference_mode():
                for operation in recording.operations:
                    operation()

        return replay

    @contextmanager
    def _recorded_kernels(self, recording: _Recording) -> Iterator[None]:
        with ExitStack() as stack:
            for group in self._groups:
                for name in _MASKED:
                    kernel = _kernel(getattr(group.backend, name), recording)
                    stack.enter_context(mock.patch.object(group.backend, name, kernel))
            coefficients = self._groups[0].backend.coefficients

            def recorded_coefficients(losses: Tensor, eps: Tensor, lr: Tensor) -> Tensor:
                out = torch.empty(2 + lr.numel())
                recording.operations.append(lambda: _write(out, coefficients(losses, eps, lr)))
                return out

            stack.enter_context(mock.patch.object(self._groups[0].backend, "coefficients", recorded_coefficients))
            yield


def _kernel(operation: Callable[..., None], recording: _Recording) -> Callable[..., None]:
    def recorded(*args: Any, **kwargs: Any) -> None:
        def run() -> None:
            if "applied" in kwargs:  # a kernel counts by itself
                kwargs["number"] = int(kwargs["applied"].min())
            operation(*args, **kwargs)

        recording.operations.append(run)

    return recorded


__all__ = ["ImitatedGraphs"]
