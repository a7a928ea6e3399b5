"""Steps whose losses come with their inputs: the whole step is a ``Program``, which a GPU records and then replays.

A replay is one launch in place of thousands, with new seeds, updates, learning rates and inputs, which the program
reads from tensors of its own. On other devices the same program runs as it is.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from .caller_warnings import warn_caller
from .estimator import Estimator
from .graphs import Graphs
from .journal import Journal
from .program import Evaluate, Memory, Program, Record, StepValues
from .tensor_trees import tensors_and_shape
from .weights import MaskedWeights

# Maximum number of programs, one for each shape of the inputs. All graphs share their memory for activations; a graph
# itself takes a few MB.
MAX_PROGRAMS = 32


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
    to call: no data-dependent control flow, no reads of values by the host, no counters, no modules switched to another
    mode. The last loss of a graph's first replay is compared with that of the function at the same weights. Where they
    differ, or a step cannot be captured, the optimizer says why, once, and calls the function as any other closure from
    then on. The bits are the same, unless the function computes differently for other values of the same shape, as
    transformers may for a two-dimensional attention mask with and without padding.

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
        self._estimator, self._values = estimator, StepValues(queries, groups, weights.values.device)
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()  # the one that was used last is the last
        self._memory: Memory | None = None
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
        self._values.load(seeds, updates, self._settings(eps, rates), program.copies(inputs))
        if not program.was_run:
            journal.run_program_(lambda passes: program.run(passes, evaluate, record), updates)
            program.was_run = True
            return self._values.result()
        replay = program.replay or self._record(program, evaluate, record)
        if replay is None:
            return None
        journal.run_program_(lambda _: replay(), updates)
        if program.replay is None:
            if not self._has_the_same_loss(program, evaluate):
                return None
            program.replay = replay
        self.steps += 1
        return self._values.result()

    def _find(self, closure: BoundLoss) -> tuple[Program, list[Tensor]] | None:
        """Returns the program of a closure, and the tensors to copy into it; None if it cannot have one."""
        if self._never is not None:
            self._refuse(closure.loss, self._never)
            return None
        if self._graphs is None:  # nothing to keep
            return Program(closure.loss, closure.inputs, self._values, self._estimator, keep=False), []
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
        if elsewhere is not None:
            self._refuse(closure.loss, f"an input is on {elsewhere}, the weights are on {device}; move it there")
            return None
        if self._memory is not None and not self._memory.is_the_same():
            self._drop_all()
            program = None
        if program is None:
            self._make_room()
            program = Program(closure.loss, closure.inputs, self._values, self._estimator, keep=True)
        self._programs[key] = program
        return program, inputs

    def _modes(self) -> tuple[Hashable, ...]:
        """What changes a forward besides its inputs and weights."""
        kind = self._weights.values.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self._model.training, cast

    def _settings(self, eps: float, rates: Sequence[float]) -> tuple[Tensor, ...]:
        values = self._weights.values
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
            self._memory = Memory(self._model, self._weights)
        try:
            return self._graphs.record(lambda: program.run(self._weights.passes(), evaluate_tensor, record))
        except Exception as error:  # whatever a loss does that cannot be recorded
            lines = str(error).strip().splitlines() or ["no message"]
            self._refuse(program.loss, f"recording it raised {type(error).__name__}: {lines[0]}")
            return None

    def _has_the_same_loss(self, program: Program, evaluate: Evaluate) -> bool:
        """Compares a replayed loss with that of the function at the same weights; waits for the device."""
        loss = torch.zeros_like(self._values.last)
        evaluate(program.evaluate, loss, "the weights of the last loss")
        if bool((loss.view(torch.int32) == self._values.last.view(torch.int32)).all()):
            return True
        self._refuse(
            program.loss,
            f"the recorded loss is {self._values.last.item()!r}, the next call of the function at the same weights "
            f"gives {loss.item()!r}: it depends on more than its inputs, or computes differently while it is recorded",
        )
        return False

    def _refuse(self, loss: Callable[..., Tensor | float], reason: str) -> None:
        """Notes that a loss is not captured, and why."""
        self.reason = reason
        if self._never is None:
            with suppress(TypeError):  # one without a hash is refused anew in every step
                self._refused.add(loss)
        self._warn(f"steps with this loss are not captured as a CUDA graph: {reason}. They run one launch at a time")

    def _make_room(self) -> None:
        """Drops the program that was not used for the longest time if there are too many."""
        if len(self._programs) < MAX_PROGRAMS:
            return
        _, oldest = self._programs.popitem(last=False)
        self.reason = (
            f"inputs of more than {MAX_PROGRAMS} shapes, or as many functions: CUDA graphs of those that were not used "
            f"for the longest time are dropped, and recorded again when needed; pad the inputs to fewer shapes, and "
            f"pass the same function in every step"
        )
        self._warn(self.reason)
        if oldest.replay is not None:
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


__all__ = ["MAX_PROGRAMS", "BoundLoss", "Capture", "CapturedSteps", "check_capture"]
