"""Experiment (d), local steps: drift against communication, at equal total steps, IID and non-IID.

A client's drift in a round is the distance of its weights from the average at the end of the round. It follows from the
scalars alone:

    | sum_t lr_t (g_i^t - g^t) z_t |  =  sqrt(k sum_t (lr_t (g_i^t - g^t))**2)        (z_t nearly orthogonal)

References:
    Meerkat, arXiv 2506.03337, section 5.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from ...engine.errors import ConfigError
from ...fed.config.run_config import RunConfig
from ...fed.ledger.file import RoundRecord, read_ledger
from ...fed.run.directory import LEDGER
from ..figures import mean_line, save_figure, subplots
from ..tables import amount, over_seeds, table
from .experiment import Arm, Experiment, Results, Settings
from .finished import FinishedRun
from .paired import after_of, loss_of, paired_difference, shown

_LOCAL_STEPS = (1, 10, 30, 50, 100)
_IID = "IID"
_PARTITIONS: dict[str, Settings] = {
    _IID: {"partition": "iid"},
    "Dirichlet 0.5": {"partition": "dirichlet", "alpha": 0.5},
    "Dirichlet 0.1": {"partition": "dirichlet", "alpha": 0.1},
}
_DRIFT = "drift of a client in a round"


class LocalSteps(Experiment):
    """Several numbers of local steps T per round, at equal total steps, for three partitions."""

    name = "local-steps"
    title = "How many local steps per round? Does frequent synchronization remove the gap between IID and non-IID?"
    settings: ClassVar[Settings] = {"rounds": 30, "local_steps": 10}
    sets = ("partition", "alpha")
    takes_part = True

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """Returns one arm per partition and T in ``_LOCAL_STEPS`` that divides a client's total steps."""
        if config.method.recipe.sends_weights:
            raise ConfigError(
                f"drift is computed from the clients' scalars, but {config.method} sends weights; choose another method"
            )
        total = config.rounds * config.local_steps
        divisors = [steps for steps in _LOCAL_STEPS if total % steps == 0]
        if len(divisors) < 2:
            raise ConfigError(
                f"rounds times local_steps is {total}, which fewer than two of {', '.join(map(str, _LOCAL_STEPS))} "
                "divide; choose a multiple of 300 to use all of them"
            )
        return [
            Arm(name=f"{name}, T = {steps}", settings={**partition, "local_steps": steps, "rounds": total // steps})
            for name, partition in _PARTITIONS.items()
            for steps in divisors
        ]

    def extra(self, directory: Path) -> float:
        """Returns the drift of a client in a round."""
        return _drift(directory)

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        lines = []
        for arm, runs in results.arms.items():
            partition, steps = arm.split(", ")
            iid = results.arms.get(f"{_IID}, {steps}", []) if partition != _IID else []
            losses = [run.validation_loss for run in runs]
            sent = [amount(runs[0].summary[f"bytes_{direction}"]) for direction in ("up", "down")]
            drift, after = over_seeds([run.extra for run in runs]), over_seeds(results.after(arm))
            apart = [shown(paired_difference(runs, iid, value)) for value in (after_of, loss_of)]
            lines.append([partition, steps, str(len(runs)), after, over_seeds(losses), *apart, drift, *sent])
        score = results.score.title
        columns = ["clients", "", "seeds", f"{score} after", "validation loss", f"{score} - IID's", "loss - its"]
        columns += [_DRIFT, "bytes up", "down"]
        return table(columns, lines)

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        figure, axes = subplots(1, 3)
        measures: dict[str, Callable[[FinishedRun], float]] = {
            results.score.axis: after_of,
            "validation loss": loss_of,
            _DRIFT: lambda run: float(run.extra),
        }
        for axis, (name, value) in zip(axes, measures.items(), strict=True):
            for i, partition in enumerate(_PARTITIONS):
                arms = [runs for arm, runs in results.arms.items() if arm.startswith(f"{partition}, ")]
                by_seed = _by_seed(arms, value)
                if by_seed:
                    mean_line(axis, by_seed, f"C{i}", partition)
            axis.set(xscale="log", xlabel="local steps T of a round", ylabel=name)
        save_figure(figure, axes, path)


def _by_seed(
    arms: Sequence[Sequence[FinishedRun]], value: Callable[[FinishedRun], float]
) -> list[list[tuple[float, float]]]:
    """Points (T, value) of the seeds that all arms have, one list per seed."""
    seeds = min((len(runs) for runs in arms), default=0)
    return [[(runs[i].config["local_steps"], value(runs[i])) for runs in arms] for i in range(seeds)]


def _drift(directory: Path) -> float:
    """Returns the drift of a client in a round: the root mean square over clients and rounds."""
    ledger = read_ledger(directory / LEDGER)
    terms = ledger.header.terms
    squares = [square for line in ledger.rounds for square in _squares(line, terms.query_learning_rates(line.round))]
    return math.sqrt(terms.elements * statistics.fmean(squares))


def _squares(line: RoundRecord, rates: list[float]) -> list[float]:
    """Returns ``sum_t (lr_t (g_i^t - g^t))**2`` of each client.

    ``g_i^t`` is 0 for steps after its last one, and for skipped queries (NaN), which did not move its weights.
    """
    squares = []
    for scalars in line.clients.values():
        moved = [0.0 if math.isnan(g) else g for g in scalars]
        padded = [*moved, *[0.0] * (len(rates) - len(scalars))]
        squares.append(sum((lr * (g - mean)) ** 2 for lr, g, mean in zip(rates, padded, line.scalars, strict=True)))
    return squares


__all__ = ["LocalSteps"]
