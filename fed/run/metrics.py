"""``Metrics``: one line a round in ``metrics.jsonl``, and the summary of all lines.

Except for times, a run that was stopped and resumed has the same lines as one that was never stopped.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...engine.errors import NonFiniteLossError, RunError
from ...engine.lm.evaluation import Evaluation
from ...engine.lm.scores import LOSS, SCORES, scores_in
from ..ledger.file import RoundRecord
from ..scalars import ClientScalars
from .directory import METRICS, RunDirectory
from .jsonl import Line, finite_or_none, is_number, read_lines
from .summary import check_summary

_TIMES = ("seconds", "seconds_in_steps", "seconds_in_forwards")


class Metrics:
    """The metrics of a run.

    Args:
        directory: the run directory.
        lines: lines that the file already has, round 0 first.
        examples: number of validation examples.

    Attributes:
        bytes: bytes sent so far in both directions.
    """

    def __init__(self, directory: RunDirectory, lines: list[Line], examples: int) -> None:
        self._directory, self._lines, self._examples = directory, lines, examples
        self.bytes = int(self._sum("bytes_up") + self._sum("bytes_down"))

    def initial_evaluation(self) -> Evaluation | None:
        """The evaluation before training; None if it has not been written yet."""
        return self._evaluation(self._lines[0]) if self._lines else None

    def add(
        self,
        record: RoundRecord | None,
        evaluation: Evaluation | None,
        *,
        seconds: float,
        in_steps: float,
        in_forwards: float,
    ) -> Line:
        """Writes a line.

        Args:
            record: the round's line in the ledger; None for round 0 if there is no calibration.
            evaluation: evaluation of the model after the round; None if it was not evaluated.
            seconds: seconds since the line before.
            in_steps: seconds of these that went into local steps; 0 for a round that an earlier process computed.
            in_forwards: seconds of these that went into forward passes; NaN if that is not known, see ``Timing``.

        Returns:
            The line.
        """
        line = _evaluation_fields(evaluation) | _round_fields(record)
        line |= {
            "seconds": round(seconds, 3),
            "seconds_in_steps": round(in_steps, 6),
            "seconds_in_forwards": finite_or_none(round(in_forwards, 6)),
        }
        self._directory.add_metrics(line)
        self._lines.append(line)
        self.bytes += line["bytes_up"] + line["bytes_down"]
        return line

    @property
    def recalls(self) -> Sequence[float]:
        """Recall of each class at the last evaluation; see ``Evaluation``. Empty if its line has none."""
        return next(self._evaluation(line).recalls for line in reversed(self._lines) if LOSS in line)

    def check_trained(self, queries: int) -> None:
        """Checks that the run trained something.

        Args:
            queries: number of queries of a step.

        Raises:
            NonFiniteLossError: if every query of every step was skipped.
        """
        steps = self._sum("steps")
        if steps and self._skipped == steps * queries:
            raise NonFiniteLossError(
                f"all {steps} local steps of the run were skipped, because no loss was finite: nothing was trained; "
                f"use dtype float32 or bfloat16 if it was float16, else a smaller eps or other data"
            )

    @property
    def _skipped(self) -> int:
        """Number of skipped queries of all rounds."""
        return sum(line.get("skipped", 0) for line in self._lines)

    def summary(self) -> dict[str, Any]:
        """The fields of the summary that follow from the lines."""
        evaluations = [self._evaluation(line) for line in self._lines if LOSS in line]
        before, last = evaluations[0], evaluations[-1]
        timed = [line for line in self._lines if line["seconds_in_steps"]]
        steps, in_steps = (sum(line[name] for line in timed) for name in ("steps", "seconds_in_steps"))
        forwards = [line["seconds_in_forwards"] for line in timed]
        return {
            **_before_and_after(before, last),
            "validation_examples": before.examples,
            **_nonfinite_fields(before, last),
            "steps": self._sum("steps"),
            "queries_skipped": self._skipped,
            "bytes_up": self._sum("bytes_up"),
            "bytes_down": self._sum("bytes_down"),
            **({"epsilon": self._lines[-1]["epsilon"]} if "epsilon" in self._lines[-1] else {}),
            "seconds": round(self._sum("seconds"), 3),
            "seconds_per_step": in_steps / steps if timed else None,
            "forward_share_of_step": None if None in forwards or not timed else sum(forwards) / in_steps,
        }

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the summary as the last line."""
        self._directory.add_metrics({"summary": summary})

    def _sum(self, name: str) -> Any:
        return sum(line[name] for line in self._lines)

    def _evaluation(self, line: Line) -> Evaluation:
        return Evaluation(
            loss=_number_or_nan(line[LOSS]),
            examples=self._examples,
            nonfinite=line.get("nonfinite", 0),
            scores={name: _number_or_nan(line[name]) for name in scores_in(line)},
            recalls=[_number_or_nan(recall) for recall in line.get("recalls", [])],
        )


def check_metrics_line(line: Line, record: RoundRecord | None, where: str, scores: list[str]) -> None:
    """Checks that a line of the metrics agrees with the ledger.

    Args:
        line: the line of a round.
        record: the round's line in the ledger; None for round 0 if there is no calibration.
        where: file and line number, for messages.
        scores: names of the scores of an evaluation, in addition to the loss.

    Raises:
        RunError: if a value differs from the ledger's, or an evaluation, a count of examples or a time is no number.
    """
    for name, value in _round_fields(record).items():
        if name not in line or line[name] != value:
            raise RunError(f"{where}: {name} is {line.get(name)!r}, in the ledger it is {value!r}; nothing was changed")
    required = [*scores, LOSS]
    found = [name for name in SCORES if name in line]
    may_lack_evaluation = record is not None and record.round != 0
    is_evaluation = set(found) == set(required) and all(_is_score(name, line[name]) for name in required)
    if not is_evaluation and (found or not may_lack_evaluation):
        raise RunError(
            f"{where}: {', '.join(required[:-1])} or {required[-1]} is not a number, or there is a score that the run "
            f"does not have; nothing was changed"
        )
    recalls = line.get("recalls", [])  # earlier versions wrote none
    if not isinstance(recalls, list) or not all(recall is None or is_number(recall) for recall in recalls):
        raise RunError(f"{where}: recalls is {recalls!r}, not a list of numbers; nothing was changed")
    nonfinite = line.get("nonfinite", 0)
    if isinstance(nonfinite, bool) or not isinstance(nonfinite, int) or nonfinite < 0:
        raise RunError(f"{where}: nonfinite is {nonfinite!r}, not a number of examples; nothing was changed")
    for name in _TIMES:
        unknown = name == "seconds_in_forwards" and name in line and line[name] is None  # in captured steps
        if not unknown and not is_number(line.get(name)):
            raise RunError(f"{where}: {name} is {line.get(name)!r}, not a number; nothing was changed")


def read_summary(path: Path) -> dict[str, Any] | None:
    """Reads the summary in a run directory. Returns None if the run is not finished.

    Raises:
        RunError: if the file is damaged.
    """
    lines = read_lines(path / METRICS)
    summary: dict[str, Any] | None = lines[-1].get("summary") if lines else None
    if summary is None:
        return None
    check_summary(summary, f"{path / METRICS}, line {len(lines)}")
    return summary


def _evaluation_fields(evaluation: Evaluation | None) -> Line:
    if evaluation is None:
        return {}
    return {
        "loss": finite_or_none(evaluation.loss),
        LOSS: finite_or_none(evaluation.loss),
        **{name: finite_or_none(value) for name, value in evaluation.scores.items()},
        **({"recalls": [finite_or_none(recall) for recall in evaluation.recalls]} if evaluation.recalls else {}),
        **({"nonfinite": evaluation.nonfinite} if evaluation.nonfinite else {}),
    }


def _before_and_after(before: Evaluation, after: Evaluation) -> dict[str, float | None]:
    """All scores and the loss, under NAME_before and NAME_after."""
    pairs = {name: (value, after.scores[name]) for name, value in before.scores.items()}
    pairs[LOSS] = before.loss, after.loss
    return {
        f"{name}_{when}": finite_or_none(value)
        for name, values in pairs.items()
        for when, value in zip(("before", "after"), values, strict=True)
    }


def _is_score(name: str, value: Any) -> bool:
    return is_number(value) or (value is None and SCORES[name].may_be_null)


def _number_or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _nonfinite_fields(before: Evaluation, after: Evaluation) -> dict[str, int]:
    """Numbers of held-out examples without finite scores; no fields if there are none."""
    if not before.nonfinite and not after.nonfinite:
        return {}
    return {"nonfinite_before": before.nonfinite, "nonfinite_after": after.nonfinite}


def _round_fields(record: RoundRecord | None) -> Line:
    """The fields that follow from the ledger. After round 0, the training loss replaces that of an evaluation."""
    if record is None:
        return {"round": 0, "steps": 0, "bytes_up": 0, "bytes_down": 0}
    line: Line = {"round": record.round}
    if record.round:
        line["loss"] = record.loss
    line |= {"steps": record.steps, "bytes_up": record.bytes_up, "bytes_down": record.bytes_down}
    if record.rejected:
        line["rejected"] = record.rejected
    skipped = ClientScalars.from_lists(record.clients).skipped
    if skipped:
        line["skipped"] = skipped
    if record.epsilon is not None:
        line["epsilon"] = record.epsilon
    return line


__all__ = ["Metrics", "check_metrics_line", "read_summary"]
