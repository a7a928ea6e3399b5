"""``Metrics``: a line a round in ``metrics.jsonl``, and what all lines come to.

Times aside, they say the same of a run that was stopped and went on as of one that was not.
"""

import math
from typing import Any

from ..evaluation import Evaluation
from .ledger import Round
from .rundir import METRICS, Line, RunDirectory


class Metrics:
    """The lines of a run.

    Args:
        directory: of the run.
        lines: those it has already, round 0 first.
        examples: evaluated on.
    """

    def __init__(self, directory: RunDirectory, lines: list[Line], examples: int) -> None:
        self._directory, self._lines, self._examples = directory, lines, examples

    @property
    def bytes(self) -> int:
        """Sent so far, both ways."""
        return int(self._sum("bytes_up") + self._sum("bytes_down"))

    def before(self) -> Evaluation | None:
        """The evaluation before training, where it has been written."""
        return self._evaluation(self._lines[0]) if self._lines else None

    def add(
        self, done: Round | None, evaluated: Evaluation | None, *, seconds: float, in_steps: float, in_forwards: float
    ) -> Line:
        """Writes a line.

        Args:
            done: the round; None is before training, where there is no calibration.
            evaluated: the model after it, if it was.
            seconds: since the line before.
            in_steps: of these, in local steps; 0 for a round that another process took.
            in_forwards: of these, in forward passes.
        """
        trained = done is not None and done.round > 0
        line: Line = {"round": 0 if done is None else done.round}
        if evaluated is not None:
            line |= {
                "loss": _number(evaluated.loss),
                "validation_loss": _number(evaluated.loss),
                "accuracy": evaluated.accuracy,
                "macro_f1": evaluated.macro_f1,
            }
        if done is not None and trained:
            line["loss"] = done.loss
        line |= {
            "steps": done.steps if done is not None else 0,
            "bytes_up": done.bytes_up if done is not None else 0,
            "bytes_down": done.bytes_down if done is not None else 0,
            "seconds": round(seconds, 3),
            "seconds_in_steps": round(in_steps, 6),
            "seconds_in_forwards": round(in_forwards, 6),
        }
        if done is not None and done.rejected:
            line["rejected"] = done.rejected
        not_taken = sum(math.isnan(g) for own in done.clients.values() for g in own) if done is not None else 0
        if not_taken:
            line["not_taken"] = not_taken
        if done is not None and done.epsilon is not None:
            line["epsilon"] = done.epsilon
        self._directory.add_metrics(line)
        self._lines.append(line)
        return line

    def summary(self) -> dict[str, Any]:
        """What the lines come to."""
        evaluations = [self._evaluation(line) for line in self._lines if "accuracy" in line]
        before, last = evaluations[0], evaluations[-1]
        timed = [line for line in self._lines if line["seconds_in_steps"]]
        in_steps = sum(line["seconds_in_steps"] for line in timed)
        return {
            "accuracy_before": before.accuracy,
            "accuracy_after": last.accuracy,
            "macro_f1_before": before.macro_f1,
            "macro_f1_after": last.macro_f1,
            "validation_loss_before": _number(before.loss),
            "validation_loss_after": _number(last.loss),
            "validation_examples": before.examples,
            "steps": self._sum("steps"),
            "queries_not_taken": sum(line.get("not_taken", 0) for line in self._lines),
            "bytes_up": self._sum("bytes_up"),
            "bytes_down": self._sum("bytes_down"),
            **({"epsilon": self._lines[-1]["epsilon"]} if "epsilon" in self._lines[-1] else {}),
            "seconds": round(self._sum("seconds"), 3),
            "seconds_per_step": in_steps / sum(line["steps"] for line in timed) if timed else None,
            "forward_share_of_step": sum(line["seconds_in_forwards"] for line in timed) / in_steps if timed else None,
        }

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the last line."""
        self._directory.add_metrics({"summary": summary})

    def _sum(self, name: str) -> Any:
        return sum(line[name] for line in self._lines)

    def _evaluation(self, line: Line) -> Evaluation:
        return Evaluation(
            accuracy=line["accuracy"],
            macro_f1=line["macro_f1"],
            loss=math.nan if line["validation_loss"] is None else line["validation_loss"],
            examples=self._examples,
        )


def _number(value: float) -> float | None:
    """As JSON has it: null for what is not finite, as the loss of a ruined model is."""
    return value if math.isfinite(value) else None


def summary_in(directory: RunDirectory) -> dict[str, Any] | None:
    """The summary of a run that is finished."""
    lines = directory.lines(METRICS)
    found: dict[str, Any] | None = lines[-1].get("summary") if lines else None
    return found


__all__ = ["Metrics", "summary_in"]
