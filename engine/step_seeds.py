"""Seeds of a step's queries, sent to a GPU for several steps at a time."""

from collections.abc import Sequence
from typing import SupportsIndex

from .device_values import DeviceValues
from .stream import check_seed, step_seed

# Number of seeds sent to a GPU in one transfer.
_SEEDS_PER_TRANSFER = 64


class StepSeeds:
    """Chooses and checks the seeds of steps.

    Args:
        values: makes the seeds' tensors.
        queries: number of queries per step.
    """

    def __init__(self, values: DeviceValues, queries: int) -> None:
        self._values, self._queries = values, queries
        self._steps_ahead = max(1, _SEEDS_PER_TRANSFER // queries)

    def default(self, root: int, step: int) -> list[int]:
        """Seeds ``step_seed(root, 0, step, query)`` of a step's queries."""
        if self._is_transfer(step):
            steps = range(step, step + self._steps_ahead)
            self._values.seeds([step_seed(root, 0, t, j) for t in steps for j in range(self._queries)])
        return [step_seed(root, 0, step, j) for j in range(self._queries)]

    def given(self, seeds: Sequence[SupportsIndex], step: int) -> list[int]:
        """Selects a step's seeds from those of many steps.

        Args:
            seeds: all seeds, in the order (step, query).
            step: number of the step, from 0.

        Raises:
            TypeError: if a seed is no integer.
            ValueError: if there are too few seeds, or one is out of range.
        """
        first, stop = step * self._queries, (step + 1) * self._queries
        if stop > len(seeds):
            raise ValueError(f"{len(seeds)} seeds were given; {step + 1} steps of {self._queries} queries need {stop}")
        if self._is_transfer(step):
            self._values.seeds([check_seed(s) for s in seeds[first : first + self._steps_ahead * self._queries]])
        return [check_seed(seed) for seed in seeds[first:stop]]

    def one_each(self, seeds: SupportsIndex | Sequence[SupportsIndex]) -> list[int]:
        """Returns the seeds of one step, one for each query.

        Raises:
            TypeError: if a seed is no integer.
            ValueError: if there are more or fewer than the step has queries, or one is out of range.
        """
        numbers = [check_seed(seed) for seed in seeds] if isinstance(seeds, Sequence) else [check_seed(seeds)]
        if len(numbers) != self._queries:
            raise ValueError(f"a step has {self._queries} queries, each with its own seed; got {len(numbers)} seeds")
        return numbers

    def _is_transfer(self, step: int) -> bool:
        """Whether seeds of several steps are sent to a GPU with this one."""
        return self._values.device.type == "cuda" and step % self._steps_ahead == 0


__all__ = ["StepSeeds"]
