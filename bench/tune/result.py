"""``Found``: what a search has found, as a table, as JSON and in words."""

import math
from dataclasses import dataclass
from typing import Any

from ...engine.errors import RunError
from ...engine.lm.scores import LOSS, SCORES
from ...fed.run.jsonl import finite_or_none
from ..tables import table
from .candidate import Candidate
from .grid import Point
from .search import Search

# Only these are shown of all scores, the first that a task has: of generated text there is none in short runs.
_SHOWN = ("accuracy", "perplexity")


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Args:
        search: the search, after it has run.
        best: the point with the smallest loss.
        chosen: the point that is chosen.
    """

    search: Search
    best: Point
    chosen: Point

    def table(self) -> str:
        """A line a run in Markdown, by learning rate."""
        axes = self.search.grid.axes
        score = next((name for name in _SHOWN if any(name in line for line in self._runs[0][1].lines)), None)
        before = next((f"{candidate.loss(0):.4f}" for _, candidate in self._runs if candidate.lines), "unknown")
        titles = [*axes, "rounds", "loss before", "after", *([SCORES[score].title] if score else []), "skipped", ""]
        lines = []
        for point, candidate in self._runs:
            values, line = self.search.grid.values(point), candidate.line(self.search.reached[point])
            lines.append([
                *(f"{values[axis]:g}" for axis in axes), str(self.search.reached[point]),
                before, _number(self.search.loss(point)),
                *([SCORES[score].text(line.get(score))] if score else []), f"{candidate.sum('skipped'):.0f}",
                self.verdict(point),
            ])  # fmt: skip
        return table(titles, lines)

    def verdict(self, point: Point) -> str:
        """What became of a run, in words."""
        search = self.search
        if point == self.chosen:
            return "chosen"
        if point == self.best:
            return "smallest loss"
        if search.candidates[point].error:
            return f"failed: {search.candidates[point].error}"
        if search.diverged(point):
            return "diverged"
        return "compared" if search.reached[point] == search.rungs[-1] else f"out after round {search.reached[point]}"

    def check(self) -> None:
        """Raises ``RunError`` if the best run is no better than the base model."""
        search, name = self.search, self.search.name(self.best)
        if search.diverged(self.best):
            reason = search.candidates[self.best].error or f"its held-out loss is {_number(search.loss(self.best))}"
            raise RunError(f"all runs diverged, also {name}: {reason}; search at smaller learning rates")
        if not search.loss(self.best) < search.start_loss:
            raise RunError(
                f"no run has a smaller held-out loss than the base model; the best is {name}; give more --tune-rounds, "
                f"or search at other learning rates"
            )

    def warnings(self) -> list[str]:
        """What the user should know about the result, a sentence each."""
        return [
            f"the best run has {edge} of the search, so a better one may lie beyond: search again from there"
            for edge in self.search.grid.edges(self.best)
        ]

    def note(self) -> str:
        """Why the run with the smallest loss was not chosen; empty if it was."""
        if self.chosen == self.best:
            return ""
        chosen, best = (self.search.start_loss - self.search.loss(point) for point in (self.chosen, self.best))
        return (
            f"{self.search.name(self.chosen)} has {chosen / best:.1%} of the improvement of "
            f"{self.search.name(self.best)} at a smaller learning rate, which is safer, so it was chosen"
        )

    @property
    def steps(self) -> int:
        """Number of local steps of all runs."""
        return sum(int(candidate.sum("steps")) for _, candidate in self._runs)

    @property
    def forwards(self) -> int:
        """Number of forward passes over a batch in these steps."""
        config = self.search.candidates[self.chosen].config
        return self.steps * config.method.recipe.gradient.forwards(config.step.queries)

    @property
    def full_runs(self) -> float:
        """The steps of all runs as a multiple of those of one run of all rounds, at the chosen point."""
        candidate = self.search.candidates[self.chosen]
        calibration, *steps = [line["steps"] for line in candidate.lines]
        return self.steps / float(calibration + sum(steps) / len(steps) * candidate.config.rounds)

    @property
    def evaluations(self) -> int:
        """Number of evaluations on the held-out examples. That of the base model is shared."""
        return 1 + sum(LOSS in line for _, candidate in self._runs for line in candidate.lines[1:])

    def cost(self) -> str:
        """What the search cost, in words."""
        seconds = sum(candidate.sum("seconds") for _, candidate in self._runs)
        return (
            f"{len(self._runs)} runs, {self.steps:,} local steps ({self.forwards:,} forward passes over a batch), "
            f"{self.full_runs:.1f} times those of one full run; {self.evaluations} evaluations; {_time(seconds)}"
        )

    def json(self) -> dict[str, Any]:
        """Everything, ready for JSON. A loss that is not finite is null."""
        search = self.search
        return {
            "format": "meerkat-tune/1",
            "chosen": search.grid.values(self.chosen),
            "smallest_loss": search.grid.values(self.best),
            "rungs": search.rungs,
            "validation_loss_before": finite_or_none(search.start_loss),
            "runs": [self._run_json(point, candidate) for point, candidate in self._runs],
            "warnings": self.warnings(),
            "cost": {
                "steps": self.steps,
                "forward_passes": self.forwards,
                "full_runs": round(self.full_runs, 3),
                "evaluations": self.evaluations,
            },
        }

    def _run_json(self, point: Point, candidate: Candidate) -> dict[str, Any]:
        reached, rungs = self.search.reached[point], self.search.rungs
        return {
            **self.search.grid.values(point),
            "directory": candidate.directory.name,
            "rounds": reached,
            "validation_loss": {str(rung): finite_or_none(candidate.loss(rung)) for rung in rungs if rung <= reached},
            "steps": int(candidate.sum("steps")),
            "skipped": int(candidate.sum("skipped")),
            "verdict": self.verdict(point),
        }

    @property
    def _runs(self) -> list[tuple[Point, Candidate]]:
        """All runs by density, eps and learning rate."""
        return sorted(self.search.candidates.items(), key=lambda item: (item[0].density, item[0].eps, item[0].lr))


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if value < 1000 else f"{value:.1e}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


__all__ = ["Found"]
