"""``Candidate``: a run of the search. It is stopped after some rounds, and resumed if it is worth more of them."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

from ...engine.errors import NonFiniteLossError
from ...engine.lm.scores import LOSS
from ...fed.config.run_config import RunConfig
from ...fed.run.directory import METRICS, is_run
from ...fed.run.execute import execute, resume
from ...fed.run.jsonl import read_lines
from ...fed.run.rounds import Progress
from ...fed.server import RoundFailedError
from .base import Base

Line = dict[str, Any]


class _Stopped(Exception):  # noqa: N818 - no error
    """A run has reached the round at which it is stopped."""


class Candidate:
    """A run with the user's settings and values of the search, in a directory of its own.

    Args:
        config: the settings of the run.
        directory: its run directory, which need not exist.

    Attributes:
        config: the settings.
        directory: the run directory.
        error: why the run cannot go on; empty if it can.
    """

    def __init__(self, config: RunConfig, directory: Path) -> None:
        self.config, self.directory, self.error = config, directory, ""

    def run_to(self, rounds: int, base: Base) -> None:
        """Runs up to the end of a round, and evaluates there if the settings say so. Does nothing if that is done.

        A run that fails because its losses are not finite is over: ``error`` says why.

        Args:
            rounds: number of the round.
            base: model, examples and masks of the search.
        """
        if self.error or self.rounds >= rounds:
            return

        def report(progress: Progress) -> None:
            if rounds <= progress.round < progress.rounds:  # everything about the round has been written
                raise _Stopped

        try:
            with base.shared(self.config) as shared:
                if is_run(self.directory):
                    resume(self.directory, report, _ignore, trust_remote_code=base.trust_remote_code, shared=shared)
                else:
                    execute(self.config, self.directory, report, _ignore, shared=shared)
        except _Stopped:
            pass
        except (NonFiniteLossError, RoundFailedError) as error:
            self.error = str(error)
        finally:
            self.__dict__.pop("lines", None)

    @cached_property
    def lines(self) -> list[Line]:
        """The lines of the run's metrics, round 0 first."""
        return [line for line in read_lines(self.directory / METRICS) if "summary" not in line]

    @property
    def rounds(self) -> int:
        """Number of rounds of the run that are finished."""
        return max(len(self.lines) - 1, 0)

    def loss(self, round: int) -> float:
        """The held-out loss after a round; infinite if it is not finite, or if the run did not get there."""
        value = self.line(round).get(LOSS)
        return math.inf if value is None else float(value)

    def line(self, round: int) -> Line:
        """The line of a round; empty if the run did not get there."""
        return self.lines[round] if round < len(self.lines) else {}

    def sum(self, name: str) -> float:
        """The sum of a count or time over all rounds."""
        return float(sum(line.get(name, 0) for line in self.lines))


def _ignore(line: str) -> None:
    """Drops a line of a run's log."""


__all__ = ["Candidate", "Line"]
