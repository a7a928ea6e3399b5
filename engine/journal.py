"""``Journal``: the updates that an optimizer has decided on, in order. The masked weights follow it.

A step enters the journal at once, in a single call, when all its losses are known. Its updates are applied afterwards,
the last one together with the next perturbation. So an exception at any point, such as KeyboardInterrupt, finds a step
that is in the journal and will be applied, or one that was never taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .errors import ModelChangedError
from .estimator import check_all_finite, nan_unless_all_finite
from .passes import Passes
from .updates import Update, UpdateLog
from .weights import MaskedWeights


@dataclass(slots=True)
class Entry:
    """The queries of one step, or one update that the caller applied.

    Args:
        seeds: seed of each query.
        rates: learning rate of one query in each parameter group.
        records: record of each query, float32 [2 + groups] on the device; empty once they were read.
        updates: (seed int64 [1], coefficients float32 [groups]) of each query; empty once they were applied.
        first: number of updates that the weights have before these.
        step: whether this is a step.
        steps: number of steps in the journal up to here.
        gradients: projected gradient of each query; empty until they were read.
        applied: projected gradients of the log, NaN for a skipped query; empty until they were read.
    """

    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    records: Sequence[Tensor]
    updates: Sequence[tuple[Tensor, Tensor]]
    first: int
    step: bool
    steps: int
    gradients: Sequence[float] = ()
    applied: Sequence[float] = ()


def _first_bad(values: Tensor, step: int) -> tuple[Tensor, int] | None:
    """Returns the arguments if a record, float32 [n, 2 + groups], is not finite; else None."""
    return None if values.isfinite().all() else (values, step)


class Journal:
    """The updates of one optimizer.

    Args:
        weights: the masked weights, which every update is applied to.
        groups: names of the masked parameters in each parameter group; empty with one group.

    Attributes:
        weights: the masked weights.
        entries: the entries since the optimizer was created or loaded.
        shown: number of entries whose scalars the caller has taken.
    """

    def __init__(self, weights: MaskedWeights, groups: tuple[tuple[str, ...], ...]) -> None:
        self.weights = weights
        self.entries: list[Entry] = []
        self._groups = groups
        self._steps_before = 0  # number of steps before the first entry
        self._start: str | None = None  # digest of the weights before the first entry; None as long as it is not needed
        self._replacements = weights.replacements
        self._applied = self._read = 0  # numbers of entries that were certainly applied and read
        self._bad: tuple[Tensor, int] | None = None  # records that were read and are not all finite; their first step
        self.shown = 0

    @property
    def device(self) -> torch.device:
        """Device of losses and scalars."""
        return self.weights.values.device

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return self._steps_before + (self.entries[-1].steps if self.entries else 0)

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps_before += steps - self.steps

    def restart(self) -> None:
        """Removes all entries and starts the log at the present weights. The number of steps stays."""
        steps, replacements = self.steps, self.weights.replacements
        self.entries, self._steps_before, self._applied, self._read, self.shown = [], steps, 0, 0, 0
        self._start, self._replacements, self._bad = None, replacements, None

    def masters_were_replaced(self) -> bool:
        """Whether the masters were replaced, or updates replayed, other than through the optimizer."""
        return self.weights.replacements != self._replacements

    def begin(self) -> None:
        """Prepares for entries: notes what the updates are applied to."""
        if self.masters_were_replaced():  # the log has no known start any more
            self.restart()
            self._start = ""
        if self._start is None:
            self._start = self.weights.digest()

    def append(
        self, seeds: Sequence[int], seed_tensors: Sequence[Tensor], rates: Sequence[float], records: Sequence[Tensor]
    ) -> None:
        """Enters the queries of a step.

        Args:
            seeds: seed of each query.
            seed_tensors: the same, int64 [1] each.
            rates: learning rate of one query in each parameter group.
            records: record of each query, float32 [2 + groups].
        """
        updates = [
            (seed, nan_unless_all_finite(record[2:])) for seed, record in zip(seed_tensors, records, strict=True)
        ]
        self.entries.append(
            Entry(
                tuple(seeds), tuple(rates), records, updates, first=self._next_update(), step=True, steps=self._next(1)
            )
        )

    def append_update(self, seed: int, seed_tensor: Tensor, rates: Sequence[float], g: float, c: Tensor) -> None:
        """Enters an update that is no step.

        Args:
            seed: seed of the perturbation.
            seed_tensor: the same, int64 [1].
            rates: learning rate in each parameter group.
            g: projected gradient, finite.
            c: coefficients, float32 [groups].
        """
        self.entries.append(
            Entry(
                (seed,), tuple(rates), (), [(seed_tensor, c)], first=self._next_update(), step=False,
                steps=self._next(0), gradients=(g,), applied=(g,),
            )
        )  # fmt: skip

    def pending(self) -> list[tuple[Tensor, Tensor]]:
        """The updates that the weights do not have yet, in order; none if the masters were replaced since."""
        if self.masters_were_replaced():
            return []
        return [
            update
            for entry in self.entries[self._applied :]
            for number, update in enumerate(entry.updates, entry.first)
            if number >= self.weights.updates
        ]

    def perturb_(self, seed: Tensor, scale: float) -> None:
        """Applies all pending updates, then ``w <- cast(master + scale * z)``; the last update shares its pass.

        Args:
            seed: int64 [1], seed of ``z``.
            scale: scale of the perturbation, ``+eps`` or ``-eps``.
        """
        scale_on_device = self.weights.values.numbers([scale], torch.float32)
        pending = self.pending()
        for update in pending[:-1]:
            self.weights.update_(*update)
        if pending:
            self.weights.update_perturb_(*pending[-1], seed, scale_on_device)
            self._forget_applied()
        else:
            self.weights.perturb_(seed, scale_on_device)

    def run_program_(self, program: Callable[[Passes], None], updates: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Runs a program that begins with the pending updates; see ``MaskedWeights.run_program_``.

        Args:
            program: the program.
            updates: the pending updates, or updates without effect if there are none.
        """
        self.weights.run_program_(program, updates)
        self._forget_applied()

    def flush_(self) -> None:
        """Applies all pending updates and sets ``w <- cast(master)``; does nothing where that holds already.

        Raises:
            ModelChangedError: if the model was moved, cast or rebuilt. The masters have all updates nevertheless, and
                the weights of a moved or cast model are restored where they are now.
        """
        pending = self.pending()
        if not pending and self.weights.restored:
            return
        try:
            self.weights.check_same_model()
        except ModelChangedError:
            for update in pending:
                self.weights.update_(*update, anywhere=True)
            self.weights.restore_anywhere_()
            raise
        for update in pending:
            self.weights.update_(*update)
        if not self.weights.restored:
            self.weights.restore_()
        self._forget_applied()

    def read(self) -> None:
        """Brings the scalars of all entries from the device."""
        stop = len(self.entries)
        unread = [entry for entry in self.entries[self._read : stop] if entry.records]
        if unread:
            values = torch.stack([record for entry in unread for record in entry.records]).cpu()
            self._bad = self._bad or _first_bad(values, self._steps_before + unread[0].steps - 1)
            gradients = iter(values[:, 1].tolist())
            applied = iter(torch.where(values.isfinite().all(1), values[:, 1], torch.nan).tolist())
            for entry in unread:
                n = len(entry.records)
                entry.gradients, entry.applied, entry.records = (*islice(gradients, n),), (*islice(applied, n),), ()
        self._read = stop

    def check_finite(self, queries: int) -> None:
        """Raises ``NonFiniteLossError``, once, if a query that was read is not finite.

        Args:
            queries: number of queries per step.
        """
        if self._bad is not None:
            (values, step), self._bad = self._bad, None
            check_all_finite(values, step * queries, queries)

    def log(self) -> UpdateLog:
        """The log of all entries; their scalars must have been read.

        Raises:
            ModelChangedError: if masters were replaced other than through the optimizer.
        """
        self.begin()
        if not self._start:
            raise ModelChangedError(
                "the masters were set or replayed other than through the optimizer, so its log has no known start; "
                "call its `reload()` to start a new one"
            )
        updates: list[Update] = [
            (seed, entry.rates if self._groups else entry.rates[0], g)
            for entry in self.entries
            for seed, g in zip(entry.seeds, entry.applied, strict=True)
        ]
        return UpdateLog(
            mask=self.weights.mask.digest, start=self._start, updates=updates, groups=self._groups,
            end=self.weights.digest(),
        )  # fmt: skip

    def _next_update(self) -> int:
        """Number of updates that the weights will have when all present entries are applied."""
        return self.weights.updates + len(self.pending())

    def _next(self, steps: int) -> int:
        """Number of steps in the journal when it has ``steps`` more."""
        return steps + (self.entries[-1].steps if self.entries else 0)

    def _forget_applied(self) -> None:
        """Frees the tensors of updates that were applied."""
        for entry in self.entries[self._applied :]:
            if entry.first + len(entry.updates) <= self.weights.updates:
                entry.updates = ()
                self._applied += 1


__all__ = ["Entry", "Journal"]
