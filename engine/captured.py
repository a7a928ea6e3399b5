"""Steps whose losses come with their inputs: the whole step is a program, which a GPU records once and then replays.

    update and +eps in one pass, forward, -eps, forward, coefficients            two-point, one query

The program reads everything that changes from step to step (seeds, the update before, learning rates, eps, inputs)
from tensors of its own, into which each step copies its values. So a recorded CUDA graph can be replayed: one launch in
place of thousands. Elsewhere the same program runs as it is.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .caller_warnings import warn_caller
from .device_values import DeviceValues
from .estimator import ESTIMATES, Estimator
from .journal import Journal
from .passes import Passes
from .tensor_trees import replace_tensors, tensors_and_shape
from .weights import MaskedWeights

# Maximum number of programs, one for each shape of the inputs. All graphs share their memory for activations; a graph
# itself takes a few MB.
MAX_PROGRAMS = 32

# Writes the loss that a function returns to a float32 [1] tensor; see ``estimator.evaluate_closure``.
Evaluate = Callable[[Callable[[], Tensor | float], Tensor, str], None]
# Makes a query's record from its losses, eps (float64 [1]) and rates (float64 [groups]); see ``estimator.Record``.
Record = Callable[[Tensor, Tensor, Tensor], Tensor]


class Capture(StrEnum):
    """Whether steps with a ``BoundLoss`` are captured as CUDA graphs.

    ``AUTO``: on CUDA, where that is possible.
    ``OFF``: never; a ``BoundLoss`` is a closure like any other.
    """

    AUTO = "auto"
    OFF = "off"


def check_capture(capture: str) -> Capture:
    """Returns the ``Capture`` member with this name; raises ``ValueError`` listing the names if there is none."""
    if capture not in list(Capture):
        raise ValueError(f"unknown choice capture={capture!r}; known: {', '.join(Capture)}")
    return Capture(capture)


class BoundLoss:
    """A loss function with its inputs: a closure for ``SparseZO.step`` and ``step_many`` that a GPU can capture.

    On CUDA, steps with the same loss function and inputs of the same shape become one CUDA graph. It repeats what the
    GPU did when it was recorded, so nothing but the tensors in ``inputs`` and the model's weights may change from call
    to call: no data-dependent control flow, no reads of values by the host, no counters. The graph's losses are
    compared with those of the function before they are used. Where a step cannot be captured, the optimizer says why,
    once, and calls the function as any other closure. The bits are the same.

    Args:
        loss: computes the loss from the inputs, a float32 scalar. Pass the same function in every step: another one,
            such as a new lambda, is another graph.
        inputs: its arguments: tensors on the model's device, and constants, in tuples, lists, mappings and dataclasses.

    Example:
        >>> loss = BoundLoss(lambda batch: batch["x"].square().mean(), {"x": torch.ones(3)})
        >>> loss().item()
        1.0
    """

    def __init__(self, loss: Callable[..., Tensor | float], *inputs: Any) -> None:
        if not callable(loss):
            raise TypeError(f"a BoundLoss needs a function that computes the loss, got {type(loss).__name__}")
        self.loss, self.inputs = loss, inputs

    def __call__(self) -> Tensor | float:
        """Computes the loss of the inputs."""
        return self.loss(*self.inputs)


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

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """See ``Graphs``. The host waits for the device first."""
        # The outer context brings the stream back where torch does not, after a capture that failed. In thread_local
        # mode other threads, such as data loaders, may pin memory meanwhile.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                body()
        return graph.replay


class _Walk:
    """A program's masked weights as its estimator uses them (``estimator.Weights``); scale 1 is +eps, -1 is -eps."""

    def __init__(self, program: "Program", passes: Passes) -> None:
        self._program, self._passes, self._updates = program, passes, list(program.updates)
        self.device = program.eps.device

    def perturb_(self, seed: Tensor, scale: float) -> None:
        """Applies the updates of the step before, then perturbs; the last update shares its pass."""
        on_device = self._program.plus if scale > 0 else self._program.minus
        updates, self._updates = self._updates, []
        for update in updates[:-1]:
            self._passes.update_(*update)
        if updates:
            self._passes.update_perturb_(*updates[-1], seed, on_device)
        else:
            self._passes.perturb_(seed, on_device)

    def flush_(self) -> None:
        """Applies the updates of the step before. The last of them restores."""
        updates, self._updates = self._updates, []
        for update in updates:
            self._passes.update_(*update)


class Program:
    """One step for one loss function and one shape of its inputs, on tensors that keep their addresses.

    Args:
        loss: the loss function.
        inputs: inputs of that shape.
        estimator: the optimizer's estimator.
        queries: number of queries per step.
        groups: number of parameter groups.
        device: device of seeds, scales and losses.

    Attributes:
        updates: (seed int64 [1], coefficients float32 [groups]) of each update of the step before.
        plus: +eps, float32 [1].
        minus: -eps, float32 [1].
        eps: eps, float64 [1].
        last: the loss that was evaluated last, float32 [1].
        replay: runs the recorded program; None before it was recorded.
        was_run: whether it has been run once, so that all that it needs is compiled and cached.
    """

    def __init__(
        self, loss: Callable[..., Tensor | float], inputs: tuple[Any, ...], estimator: Estimator, queries: int,
        groups: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.loss, self._estimate = loss, ESTIMATES[estimator]
        self._inputs = [_not_expanded(tensor.detach()).clone() for tensor in tensors_and_shape(inputs)[0]]
        own = iter(self._inputs)
        self._arguments = replace_tensors(inputs, lambda tensor: next(own).expand(tensor.shape))

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._seeds = [zeros(1, dtype=torch.int64) for _ in range(queries)]
        self.updates = [(zeros(1, dtype=torch.int64), zeros(groups)) for _ in range(queries)]
        self.plus, self.minus, self.eps = zeros(1), zeros(1), zeros(1, dtype=torch.float64)
        self._rates = zeros(groups, dtype=torch.float64)
        self.last, self._mean, self._records = zeros(1), zeros(), zeros(queries, 2 + groups)
        self._settings: Sequence[Tensor] = ()
        self.replay: Callable[[], None] | None = None
        self.was_run = False

    def load(
        self, inputs: Sequence[Tensor], seeds: Sequence[Tensor], settings: Sequence[Tensor],
        updates: Sequence[tuple[Tensor, Tensor]],
    ) -> None:  # fmt: skip
        """Copies the values of a step to where the program reads them, without waiting for the device.

        Args:
            inputs: the tensors of the inputs.
            seeds: seed of each query, int64 [1].
            settings: +eps, -eps (float32 [1]), eps (float64 [1]), rates (float64 [groups]): constants that never
                change, so that the same tensors need not be copied again.
            updates: see the class; as many as there are queries.
        """
        own, values = [*self._inputs, *self._seeds], [*map(_not_expanded, inputs), *seeds]
        for own_update, update in zip(self.updates, updates, strict=True):
            own += own_update
            values += update
        if list(map(id, settings)) != list(map(id, self._settings)):
            own += (self.plus, self.minus, self.eps, self._rates)
            values += settings
            self._settings = ()  # an exception may come before the copies
        torch._foreach_copy_(own, values, non_blocking=True)
        self._settings = settings

    def run(self, passes: Passes, evaluate: Evaluate, record: Record) -> None:
        """Runs the step, or has it recorded.

        Args:
            passes: the operations on the weights.
            evaluate: evaluates the loss.
            record: makes a query's record.
        """

        def evaluate_and_keep(out: Tensor, where: str) -> None:
            evaluate(self.evaluate, out, where)
            self.last.copy_(out)

        def record_of(pair: Tensor, factor: float) -> Tensor:
            return record(pair, self.eps if factor == 1 else self.eps * factor, self._rates)

        loss, records = self._estimate(_Walk(self, passes), self._seeds, 1.0, evaluate_and_keep, record_of)
        self._mean.copy_(loss)
        self._records.copy_(torch.stack(records))

    def evaluate(self) -> Tensor | float:
        """Computes the loss of the program's copy of the inputs."""
        return self.loss(*self._arguments)

    def result(self) -> tuple[Tensor, list[Tensor]]:
        """Returns copies of the loss, float32 scalar, and of each query's record, float32 [2 + groups]."""
        return self._mean.clone(), list(self._records.clone().unbind())


class _Memory:
    """Where a model's parameters, buffers and masters are: a recorded program reads and writes there.

    Args:
        model: the model.
        weights: its masked weights.
    """

    def __init__(self, model: nn.Module, weights: MaskedWeights) -> None:
        self._weights, self._passes = weights, weights.passes()
        self._tensors = [
            (held, name, tensor, tensor.data_ptr())
            for module in model.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]

    def is_the_same(self) -> bool:
        """Whether all of them are still there."""
        return self._passes.same_memory(self._weights.passes()) and all(
            held.get(name) is tensor and tensor.data_ptr() == address for held, name, tensor, address in self._tensors
        )


class CapturedSteps:
    """Takes steps with a ``BoundLoss``, by programs that are kept.

    Args:
        model: the model.
        weights: its masked weights.
        estimator: the optimizer's estimator.
        queries: number of queries per step.
        groups: number of parameter groups.
        graphs: records programs; None runs them as they are.
        reason: why nothing can be captured; None if it can.

    Attributes:
        steps: number of steps that were replayed from a recorded program.
        reason: why steps are not captured, the latest reason; None if there was none.
    """

    def __init__(
        self, model: nn.Module, weights: MaskedWeights, estimator: Estimator, queries: int, groups: int,
        graphs: Graphs | None, reason: str | None = None,
    ) -> None:  # fmt: skip
        self._model, self._weights, self._graphs = model, weights, graphs
        self._estimator, self._queries, self._groups = estimator, queries, groups
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()  # the one that was used last is the last
        self._memory: _Memory | None = None
        self._refused: set[Callable[..., Tensor | float]] = set()
        self._never = reason
        self._warned: set[str] = set()
        self.steps = 0
        self.reason: str | None = None
        values = weights.values
        nan = torch.full((groups,), torch.nan, dtype=torch.float32, device=values.device)
        self._no_updates = [(torch.zeros(1, dtype=torch.int64, device=values.device), nan)] * queries

    def take(
        self, journal: Journal, closure: BoundLoss, seeds: Sequence[Tensor], eps: float, rates: Sequence[float],
        evaluate: Evaluate, record: Record,
    ) -> tuple[Tensor, list[Tensor]] | None:  # fmt: skip
        """Takes a step. The weights are left perturbed.

        Args:
            journal: the optimizer's journal; its pending updates are applied.
            closure: the loss and its inputs.
            seeds: seed of each query, int64 [1].
            eps: perturbation scale.
            rates: learning rate of one query in each group.
            evaluate: evaluates the loss.
            record: makes a query's record.

        Returns:
            Loss, float32 scalar, and each query's record, float32 [2 + groups]; see ``estimator.ESTIMATES``. None if
            the step must be taken without a program: then none was taken.
        """
        found = self._find(closure)
        if found is None:
            return None
        program, inputs = found
        updates = journal.pending() or self._no_updates
        program.load(inputs, seeds, self._settings(eps, rates), updates)
        if self._graphs is None or not program.was_run:
            journal.run_program_(lambda passes: program.run(passes, evaluate, record), updates)
            program.was_run = True
            return program.result()
        replay = program.replay or self._record(program, evaluate, record)
        if replay is None:
            return None
        journal.run_program_(lambda _: replay(), updates)
        if program.replay is None:
            if not self._has_the_same_loss(program, evaluate):
                return None
            program.replay = replay
        self.steps += 1
        return program.result()

    def _find(self, closure: BoundLoss) -> tuple[Program, list[Tensor]] | None:
        """Returns the program of a closure and the tensors of its inputs; None if it cannot have one."""
        if self._never is not None:
            self._refuse(closure.loss, self._never)
            return None
        try:
            if closure.loss in self._refused:
                return None
            inputs, shape = tensors_and_shape(closure.inputs)
            key: Hashable = closure.loss, shape, *self._modes()
            program = self._programs.pop(key, None)
        except TypeError as error:  # no such input, or it has no hash
            self._refuse(closure.loss, str(error))
            return None
        device = self._weights.values.device
        elsewhere = next((tensor.device for tensor in inputs if tensor.device != device), None)
        if self._graphs is not None and elsewhere is not None:
            self._refuse(closure.loss, f"an input is on {elsewhere}, the weights are on {device}; move it there")
            return None
        if self._memory is not None and not self._memory.is_the_same():
            self._drop_all()
            program = None
        if program is None:
            self._make_room()
            program = Program(closure.loss, closure.inputs, self._estimator, self._queries, self._groups, device)
        self._programs[key] = program
        return program, inputs

    def _modes(self) -> tuple[Hashable, ...]:
        """What changes a forward besides its inputs and weights."""
        kind = self._weights.values.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self._model.training, cast

    def _settings(self, eps: float, rates: Sequence[float]) -> tuple[Tensor, ...]:
        values: DeviceValues = self._weights.values
        return (
            values.numbers([eps], torch.float32),
            values.numbers([-eps], torch.float32),
            values.numbers([eps], torch.float64),
            values.numbers(rates, torch.float64),
        )

    def _record(self, program: Program, evaluate: Evaluate, record: Record) -> Callable[[], None] | None:
        """Records a program; None, with the reason noted, if that fails. Nothing is run."""

        def evaluate_tensor(loss: Callable[[], Tensor | float], out: Tensor, where: str) -> None:
            def tensor() -> Tensor:
                value = loss()
                if not isinstance(value, Tensor):
                    raise TypeError(f"it returns a {type(value).__name__}, which every replay would return again")
                return value

            evaluate(tensor, out, where)

        assert self._graphs is not None
        if self._memory is None:
            self._memory = _Memory(self._model, self._weights)
        try:
            return self._graphs.record(lambda: program.run(self._weights.passes(), evaluate_tensor, record))
        except Exception as error:  # whatever a loss does that cannot be recorded
            lines = str(error).strip().splitlines() or ["no message"]
            self._refuse(program.loss, f"recording it raised {type(error).__name__}: {lines[0]}")
            return None

    def _has_the_same_loss(self, program: Program, evaluate: Evaluate) -> bool:
        """Compares a replayed loss with that of the function at the same weights; waits for the device."""
        loss = torch.zeros_like(program.last)
        evaluate(program.evaluate, loss, "the weights of the last loss")
        if bool((loss.view(torch.int32) == program.last.view(torch.int32)).all()):
            return True
        self._refuse(
            program.loss,
            f"the recorded loss is {program.last.item()!r}, the next call of the function at the same weights gives "
            f"{loss.item()!r}: it depends on more than its inputs, or computes differently while it is recorded",
        )
        return False

    def _refuse(self, loss: Callable[..., Tensor | float], reason: str) -> None:
        """Notes that a loss is not captured, and why."""
        self.reason = reason
        if self._never is None and isinstance(loss, Hashable):
            self._refused.add(loss)
        self._warn(f"steps with this loss are not captured as a CUDA graph: {reason}. They run one launch at a time")

    def _make_room(self) -> None:
        """Drops the program that was not used for the longest time if there are too many."""
        if len(self._programs) < MAX_PROGRAMS:
            return
        _, oldest = self._programs.popitem(last=False)
        if oldest.replay is not None:
            self._warn(
                f"inputs of more than {MAX_PROGRAMS} shapes: CUDA graphs of shapes that were not used for the longest "
                f"time are dropped, and recorded again when needed; pad the inputs to fewer shapes"
            )
            self._wait()

    def _drop_all(self) -> None:
        self._wait()
        self._programs.clear()
        self._memory = None

    def _wait(self) -> None:
        """Waits for the device, which may be running a graph that is about to be destroyed."""
        if self._weights.values.device.type == "cuda":
            torch.cuda.synchronize(self._weights.values.device)

    def _warn(self, message: str) -> None:
        if self._graphs is not None and message not in self._warned:
            self._warned.add(message)
            warn_caller(message)


def _not_expanded(tensor: Tensor) -> Tensor:
    """Returns a tensor with size 1 in its expanded dimensions, which hold the same elements over and over."""
    if 0 in tensor.stride():
        for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor = tensor.narrow(dimension, 0, 1)
    return tensor


__all__ = ["MAX_PROGRAMS", "BoundLoss", "Capture", "CapturedSteps", "CudaGraphs", "Graphs", "Program", "check_capture"]
