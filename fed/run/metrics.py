"""``Metrics``: a line a round in ``metrics.jsonl``, and what all lines come to.

Times aside, they say the same of a run that was stopped and went on as of one that was not.
"""

import math
from pathlib import Path
from typing import Any

from ...engine.errors import RunError
from ...engine.lm.evaluation import Evaluation
from ..ledger.file import RoundRecord
from ..scalars import ClientScalars
from .directory import METRICS, RunDirectory
from .jsonl import Line, finite, is_number, read_lines

_TIMES = ("seconds", "seconds_in_steps", "seconds_in_forwards")


class Metrics:
    """The lines of a run.

    Args:
        directory: of the run.
        lines: those it has already, round 0 first.
        examples: evaluated on.
    """

    def __init__(self, directory: RunDirectory, lines: list[Line], examples: int) -> None:
        self._directory, self._lines, self._examples = directory, lines, examples
        self.bytes = int(self._sum("bytes_up") + self._sum("bytes_down"))  # sent so far, both ways

    def before(self) -> Evaluation | None:
        """The evaluation before training, where it has been written."""
        return self._evaluation(self._lines[0]) if self._lines else None

    def add(
        self,
        done: RoundRecord | None,
        evaluated: Evaluation | None,
        *,
        seconds: float,
        in_steps: float,
        in_forwards: float,
    ) -> Line:
        """Writes a line.

        Args:
            done: the round; None is before training, where there is no calibration.
            evaluated: the model after it, if it was.
            seconds: since the line before.
            in_steps: of these, in local steps; 0 for a round that another process took.
            in_forwards: of these, in forward passes.
        """
        line = _of_evaluation(evaluated) | _of_round(done)
        line |= {
            "seconds": round(seconds, 3),
            "seconds_in_steps": round(in_steps, 6),
            "seconds_in_forwards": round(in_forwards, 6),
        }
        self._directory.add_metrics(line)
        self._lines.append(line)
        self.bytes += line["bytes_up"] + line["bytes_down"]
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
            "validation_loss_before": finite(before.loss),
            "validation_loss_after": finite(last.loss),
            "validation_examples": before.examples,
            "steps": self._sum("steps"),
            "queries_skipped": sum(line.get("skipped", 0) for line in self._lines),
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


def check_metrics_line(line: Line, done: RoundRecord | None, where: str) -> None:
    """Raises ``RunError`` unless a line of the metrics says of a round what the ledger does."""
    for name, value in _of_round(done).items():
        if name not in line or line[name] != value:
            raise RunError(f"{where}: {name} is {line.get(name)!r}, by the ledger {value!r}; nothing was changed")
    evaluated = [line.get(name) for name in ("accuracy", "macro_f1", "validation_loss")]
    whole = all(map(is_number, evaluated[:2])) and (is_number(evaluated[2]) or evaluated[2] is None)
    needed = done is None or done.round == 0
    absent = evaluated == [None] * 3 and "accuracy" not in line and not needed
    if not (whole or absent) or not all(is_number(line.get(name)) for name in _TIMES):
        raise RunError(f"{where}: an evaluation or a time is no number; nothing was changed")


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of the run in a directory; None if it is not finished."""
    lines = read_lines(path / METRICS)
    found: dict[str, Any] | None = lines[-1].get("summary") if lines else None
    if found is not None and not (isinstance(found, dict) and "weights" in found and "accuracy_after" in found):
        raise RunError(f"{path / METRICS}, line {len(lines)}: no summary of a run; the file is damaged")
    return found


def _of_evaluation(evaluated: Evaluation | None) -> Line:
    if evaluated is None:
        return {}
    return {
        "loss": finite(evaluated.loss),
        "validation_loss": finite(evaluated.loss),
        "accuracy": evaluated.accuracy,
        "macro_f1": evaluated.macro_f1,
    }


def _of_round(done: RoundRecord | None) -> Line:
    """What the ledger has of a round; the training loss goes before that of an evaluation."""
    if done is None:
        return {"round": 0, "steps": 0, "bytes_up": 0, "bytes_down": 0}
    line: Line = {"round": done.round} | ({"loss": done.loss} if done.round else {})
    line |= {"steps": done.steps, "bytes_up": done.bytes_up, "bytes_down": done.bytes_down}
    skipped = ClientScalars.of(done.clients).skipped
    return (
        line
        | ({"rejected": done.rejected} if done.rejected else {})
        | ({"skipped": skipped} if skipped else {})
        | ({"epsilon": done.epsilon} if done.epsilon is not None else {})
    )


__all__ = ["Metrics", "check_metrics_line", "read_summary"]
