"""``Search``: successive halving on the held-out loss, with steps to better neighbours before and after.

1. All learning rates of the start run to the first rung, which is a number of rounds. While the best point has
   neighbours on the grid that have not been tried, they are tried too.
2. Of the points that have not diverged, the better half goes on to the next rung, twice as many rounds; and so on.
3. After the last rung the best point is compared with its neighbours again, after as many rounds. So a neighbour that
   fell out early gets its turn: short runs favour large learning rates.
4. If half the learning rate is nearly as good as the best, it is chosen.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

from .base import Base
from .candidate import Candidate
from .grid import Grid, Point

# A run has diverged if its held-out loss is more than this times that of the base model. A smaller rise may be noise.
_DIVERGED = 1.05
# Half the learning rate is chosen if it has this share of the improvement. The loss rises steeply on the other side: of
# two rates that are nearly as good, the larger may ruin a run that is longer or has another seed (docs/tuning.md).
_NEARLY = 0.97


def rungs(rounds: int) -> list[int]:
    """The rounds at which runs are compared.

    Args:
        rounds: number of rounds of the longest runs at most, 1 or more.

    Returns:
        A quarter of ``rounds``, rounded down to 1 or more, and twice and four times that if it is not above ``rounds``.
    """
    first = max(1, rounds // 4)
    return [first * factor for factor in (1, 2, 4) if first * factor <= rounds]


class Search:
    """A search for the point of a grid with the smallest held-out loss.

    Args:
        grid: the points that may be tried.
        rungs: the rounds at which runs are compared: the first, and multiples of it, ascending.
        base: model, examples and masks of the runs.
        runs: directory for the run directories.
        log: called with a line before each run.

    Attributes:
        grid: the points that may be tried.
        rungs: the rounds at which runs are compared.
        candidates: the runs so far, by point.
        reached: the last round at which each run was compared; 0: none. A directory from an earlier call may be ahead
            of it. The search decides as if it were not, so that it takes the same way again.
    """

    def __init__(self, grid: Grid, rungs: list[int], base: Base, runs: Path, log: Callable[[str], None]) -> None:
        self.grid, self.rungs, self._base, self._runs, self._log = grid, rungs, base, runs, log
        self.candidates: dict[Point, Candidate] = {}
        self.reached: dict[Point, int] = {}

    def run(self) -> Point:
        """Runs what has not been run yet, and returns the point with the smallest loss after the last rung.

        Raises:
            MeerkatError: see ``execute``. Runs that fail because their losses are not finite raise nothing.
        """
        for point in self.grid.start():
            self._run_to(point, 0)
        self._try_neighbours(0)
        for rung in range(1, len(self.rungs)):
            healthy = [point for point in self._ranked(rung - 1) if not self.diverged(point)]
            for point in healthy[: math.ceil(len(healthy) / 2)]:
                self._run_to(point, rung)
        return self._try_neighbours(len(self.rungs) - 1)

    def safer(self, best: Point) -> Point:
        """The point to choose: the best, or its neighbour with a smaller learning rate if that is nearly as good."""
        smaller = self.grid.smaller_lr(best)
        if smaller is None or self.diverged(smaller) or self.reached[smaller] < self.reached[best]:
            return best
        improvements = [self.start_loss - self.loss(point) for point in (smaller, best)]
        return smaller if improvements[0] >= _NEARLY * improvements[1] > 0 else best

    @property
    def start_loss(self) -> float:
        """The held-out loss of the base model."""
        return next(candidate.loss(0) for candidate in self.candidates.values() if candidate.lines)

    def loss(self, point: Point) -> float:
        """The held-out loss of a point where it was last compared; infinite if it is not finite or the run failed."""
        return math.inf if self.candidates[point].error else self.candidates[point].loss(self.reached[point])

    def diverged(self, point: Point) -> bool:
        """Whether a run failed, or its held-out loss is not finite or far above that of the base model."""
        loss = self.loss(point)
        return math.isinf(loss) or loss > _DIVERGED * self.start_loss

    def name(self, point: Point) -> str:
        """The name of a point's run directory: the values that the search varies."""
        return "-".join(f"{axis}-{self.grid.values(point)[axis]:g}" for axis in self.grid.axes)

    def _run_to(self, point: Point, rung: int) -> None:
        """Runs a point to a rung, unless it diverges before."""
        if point not in self.candidates:
            config = self.grid.config(point).replace(eval_every=self.rungs[0], metrics="")  # generating takes long
            self.candidates[point] = Candidate(config, self._runs / self.name(point))
            self.reached[point] = 0
        candidate = self.candidates[point]
        for rounds in self.rungs[: rung + 1]:
            if self.reached[point] >= rounds:
                continue
            if self.reached[point] and self.diverged(point):
                return
            if candidate.rounds < rounds:
                self._log(f"{self.name(point)}: rounds {candidate.rounds + 1} to {rounds}")
                with warnings.catch_warnings(record=True, action="always", category=UserWarning) as caught:
                    candidate.run_to(rounds, self._base)
                for text in dict.fromkeys(str(warning.message) for warning in caught):
                    self._log(f"{self.name(point)}: {text}")
            self.reached[point] = rounds

    def _ranked(self, rung: int) -> list[Point]:
        """The points that got to a rung, best first; then those that diverged, the smallest learning rate first."""

        def key(point: Point) -> tuple[bool, float, float]:
            diverged, lr = self.diverged(point), self.grid.values(point)["lr"]
            return diverged, lr if diverged else self.candidates[point].loss(self.rungs[rung]), lr

        return sorted(
            (p for p, there in self.reached.items() if there >= self.rungs[rung] or self.diverged(p)), key=key
        )

    def _try_neighbours(self, rung: int) -> Point:
        """Runs the neighbours of the best point to a rung until none of them is better; returns the best."""
        while True:
            best, before = self._ranked(rung)[0], dict(self.reached)
            for point in self.grid.neighbours(best):
                self._run_to(point, rung)
            if self.reached == before:
                return best


__all__ = ["Search", "rungs"]
