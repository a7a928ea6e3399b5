"""``Program``: a step that reads all that changes from step to step from tensors of its own: it can be recorded.

update and +eps in one pass, forward, -eps, forward, coefficients            two-point, one query
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .estimator import ESTIMATES, Estimator
from .passes import Passes
from .tensor_trees import replace_tensors
from .weights import MaskedWeights

# Writes the loss that a function returns to a float32 [1] tensor; see ``estimator.evaluate_closure``.
Evaluate = Callable[[Callable[[], Tensor | float], Tensor, str], None]
# Makes a query's record from its losses, eps (float64 [1]) and rates (float64 [groups]); see ``estimator.Record``.
Record = Callable[[Tensor, Tensor, Tensor], Tensor]


class StepValues:
    """What changes from step to step, in tensors that keep their addresses, and what a step computes.

    Args:
        queries: number of queries per step.
        groups: number of parameter groups.
        device: device of seeds, scales and losses.

    Attributes:
        seeds: seed of each query, int64 [1].
        updates: (seed int64 [1], coefficients float32 [groups]) of each update of the step before; as many as queries.
        plus: +eps, float32 [1].
        minus: -eps, float32 [1].
        eps: eps, float64 [1].
        rates: learning rate of one query in each group, float64 [groups].
        last: the loss that was evaluated last, float32 [1].
        mean: the step's loss, float32 scalar.
        records: record of each query, float32 [queries, 2 + groups]; see ``estimator.Record``.
    """

    @torch.inference_mode(False)  # later steps write these tensors, within inference mode or not
    def __init__(self, queries: int, groups: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.seeds = [zeros(1, dtype=torch.int64) for _ in range(queries)]
        self.updates = [(zeros(1, dtype=torch.int64), zeros(groups)) for _ in range(queries)]
        self.plus, self.minus, self.eps = zeros(1), zeros(1), zeros(1, dtype=torch.float64)
        self.rates = zeros(groups, dtype=torch.float64)
        self.last, self.mean, self.records = zeros(1), zeros(), zeros(queries, 2 + groups)
        self._settings: Sequence[Tensor] = ()  # what plus, minus, eps and rates were copied from

    def load(
        self, seeds: Sequence[Tensor], updates: Sequence[tuple[Tensor, Tensor]], settings: Sequence[Tensor],
        inputs: Sequence[tuple[Tensor, Tensor]],
    ) -> None:  # fmt: skip
        """Copies the values of a step, without waiting for the device.

        Args:
            seeds: as the attribute.
            updates: as the attribute.
            settings: plus, minus, eps and rates: constants, so the same tensors are not copied again.
            inputs: pairs (where to, tensor) that are copied too.
        """
        own, values = [*self.seeds], [*seeds]
        for pair, update in zip(self.updates, updates, strict=True):
            own += pair
            values += update
        for to, value in inputs:
            own.append(to)
            values.append(value)
        if list(map(id, settings)) != list(map(id, self._settings)):
            own += (self.plus, self.minus, self.eps, self.rates)
            values += settings
            self._settings = ()  # an exception may come before the copies
        torch._foreach_copy_(own, values, non_blocking=True)
        self._settings = settings

    def result(self) -> tuple[Tensor, list[Tensor]]:
        """Returns copies of the step's loss and of each query's record."""
        return self.mean.clone(), list(self.records.clone().unbind())


class _Walk:
    """A program's masked weights as its estimator uses them (``estimator.Weights``); scale 1 is +eps, -1 is -eps."""

    def __init__(self, values: "StepValues", passes: Passes) -> None:
        self._values, self._passes, self._updates = values, passes, list(values.updates)
        self.device = values.eps.device

    def perturb_(self, seed: Tensor, scale: float) -> None:
        """Applies the updates of the step before, then perturbs; the last update shares its pass."""
        on_device = self._values.plus if scale > 0 else self._values.minus
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
    """One step for one loss function and one shape of its inputs.

    Args:
        loss: the loss function.
        inputs: its arguments.
        values: everything else that changes from step to step.
        estimator: the optimizer's estimator.
        keep: whether the program is for steps with other inputs too, so that it needs a copy of its own.

    Attributes:
        loss: the loss function.
        values: see the argument.
        replay: runs the recorded program; None before it was recorded.
        was_run: whether it has been run once, so that all that it needs is compiled and cached.
    """

    def __init__(
        self, loss: Callable[..., Tensor | float], inputs: tuple[Any, ...], values: StepValues, estimator: Estimator,
        *, keep: bool,
    ) -> None:  # fmt: skip
        self.loss, self.values, self._estimate = loss, values, ESTIMATES[estimator]
        self._inputs: list[Tensor] = []
        self._arguments = replace_tensors(inputs, self._own) if keep else inputs
        self.replay: Callable[[], None] | None = None
        self.was_run = False

    @torch.inference_mode(False)
    def _own(self, tensor: Tensor) -> Tensor:
        self._inputs.append(_not_expanded(tensor.detach()).clone())
        return self._inputs[-1].expand(tensor.shape)

    def copies(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Pairs its copy of each input with the input of a step; see ``StepValues.load``."""
        return list(zip(self._inputs, map(_not_expanded, inputs), strict=True))

    def run(self, passes: Passes, evaluate: Evaluate, record: Record) -> None:
        """Runs the step, or has it recorded.

        Args:
            passes: the operations on the weights.
            evaluate: evaluates the loss.
            record: makes a query's record.
        """
        values = self.values

        losses: list[Tensor] = []

        def evaluate_and_keep(out: Tensor, where: str) -> None:
            evaluate(self.evaluate, out, where)
            losses.append(out)

        def record_of(pair: Tensor, half: float | Tensor) -> Tensor:
            if not isinstance(half, Tensor):  # in units of eps
                half = values.eps if half == 1 else values.eps * half
            return record(pair, half, values.rates)

        loss, records = self._estimate(_Walk(values, passes), values.seeds, 1.0, evaluate_and_keep, record_of)
        values.mean.copy_(loss)
        values.last.copy_(losses[-1])
        torch.stack(records, out=values.records)

    def evaluate(self) -> Tensor | float:
        """Computes the loss of the program's inputs."""
        return self.loss(*self._arguments)


class Memory:
    """Where a model's modules, parameters, buffers and masters are: a recorded program reads and writes there.

    Args:
        model: the model.
        weights: its masked weights.
    """

    def __init__(self, model: nn.Module, weights: MaskedWeights) -> None:
        self._weights, self._passes = weights, weights.passes()
        modules = list(model.modules())
        self._tensors = [
            (held, name, tensor, None if tensor is None else tensor.data_ptr())
            for module in modules
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
        ]
        self._modules = [
            (module._modules, name, child) for module in modules for name, child in module._modules.items()
        ]

    def is_the_same(self) -> bool:
        """Whether all of them are still there, in the same modules."""
        return (
            self._passes.same_memory(self._weights.passes())
            and all(held.get(name) is child for held, name, child in self._modules)
            and all(
                held.get(name) is tensor and (tensor is None or tensor.data_ptr() == address)
                for held, name, tensor, address in self._tensors
            )
        )


def _not_expanded(tensor: Tensor) -> Tensor:
    """Returns a tensor with size 1 in its expanded dimensions, which hold the same elements over and over."""
    if 0 in tensor.stride():
        for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor = tensor.narrow(dimension, 0, 1)
    return tensor


__all__ = ["Evaluate", "Memory", "Program", "Record", "StepValues"]
