"""``FinishedRun``: what is kept of a finished run, in a run directory or in a record, a file that holds it alone.

A record is all that tables and figures need. So the run directories of an experiment, with their ledgers and masks, may
be deleted, and the records of runs on several machines put together.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...engine.atomic_files import write_atomic
from ...engine.errors import RunError
from ...engine.lm.scores import LOSS, scores_in, shown
from ...fed.config.toml import read_toml
from ...fed.run.directory import CONFIG, METRICS
from ...fed.run.jsonl import read_lines

_FORMAT = "meerkat-experiment-run/1"


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run.

    Args:
        config: the run's settings by their flat names (the names of the options), without those that are not set.
        lines: the metrics of each round, as in ``metrics.jsonl``, round 0 first.
        summary: the run's summary.
        extra: what the experiment keeps of the run beyond that; see ``Experiment.extra``.
    """

    config: dict[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any]
    extra: Any = None

    @classmethod
    def in_directory(cls, directory: Path, extra: Any = None) -> "FinishedRun":
        """The run in a run directory.

        Args:
            directory: the run directory.
            extra: see the class.
        """
        *lines, last = read_lines(directory / METRICS)
        return cls(config=read_toml(directory / CONFIG), lines=lines, summary=last["summary"], extra=extra)

    @classmethod
    def recorded(cls, path: Path) -> "FinishedRun":
        """The run in a record.

        Args:
            path: the record.

        Raises:
            RunError: if the file is no record, or damaged.
        """
        try:
            record = json.loads(path.read_bytes())
            if record.pop("format") != _FORMAT:
                raise ValueError("its format is unknown")
            return cls(**record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is no record of a finished run ({error}); delete it to run it again") from error

    def record(self, path: Path) -> None:
        """Writes the run to a record.

        Args:
            path: the record; its directory is made if there is none.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps({"format": _FORMAT, **asdict(self)}) + "\n").encode())

    @property
    def main_score(self) -> str:
        """Name of the score that the task is judged by; see ``scores.shown``."""
        return shown(scores_in(self.summary, "_after"))[0]

    @property
    def before(self) -> float:
        """The main score before training; infinite if it was not finite."""
        return _number(self.summary[f"{self.main_score}_before"])

    @property
    def after(self) -> float:
        """The main score after training; infinite if the run diverged."""
        return _number(self.summary[f"{self.main_score}_after"])

    @property
    def validation_loss(self) -> float:
        """The validation loss after training; infinite if the run diverged."""
        return _number(self.summary[f"{LOSS}_after"])

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Pairs (round, main score), one per evaluation; infinite where the score was not finite."""
        name = self.main_score
        return [(float(line["round"]), _number(line[name])) for line in self.lines if name in line]


def _number(value: float | None) -> float:
    """A score from JSON, where null stands for one that is not finite."""
    return math.inf if value is None else float(value)


__all__ = ["FinishedRun"]
