"""Experiment (d), local steps: drift against communication, at equal total steps.

A client's drift in a round is the distance of its weights from the average at the end of the round. It follows from the
scalars alone:

    | sum_t lr_t (g_i^t - g^t) z_t |  =  sqrt(k sum_t (lr_t (g_i^t - g^t))**2)        (z_t nearly orthogonal)

References:
    Meerkat, arXiv 2506.03337, section 5.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ...engine.errors import ConfigError
from ...fed.config.run_config import RunConfig
from ...fed.ledger.file import RoundRecord, read_ledger
from ...fed.run.directory import LEDGER
from ..tables import amount, over_seeds, table
from .experiment import Arm, Experiment, Results, Settings
from .figures import mean_line, save_figure, subplots

_LOCAL_STEPS = (1, 10, 30, 50, 100)
_DRIFT = "drift of a client in a round"


class LocalSteps(Experiment):
    """Several numbers of local steps T per round, at equal total steps."""

    name = "local-steps"
    title = "How many local steps per round? Drift against communication, at equal total steps"
    settings: ClassVar[Settings] = {"rounds": 30, "local_steps": 10, "partition": "dirichlet", "alpha": 0.3}

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """Returns one arm per T in ``_LOCAL_STEPS`` that divides a client's total steps."""
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
            Arm(name=f"T = {steps}", settings={"local_steps": steps, "rounds": total // steps}) for steps in divisors
        ]

    def extra(self, directory: Path) -> float:
        """Returns the drift of a client in a round."""
        return _drift(directory)

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        lines = []
        for arm, runs in results.arms.items():
            losses = [run.validation_loss for run in runs]
            sent = [amount(runs[0].summary[f"bytes_{direction}"]) for direction in ("up", "down")]
            drift, after = over_seeds([run.extra for run in runs]), over_seeds(results.after(arm))
            lines.append([arm, str(runs[0].config["rounds"]), after, over_seeds(losses), drift, *sent])
        after = f"{results.score.title} after"
        return table(["", "rounds", after, "validation loss", _DRIFT, "bytes up", "down"], lines)

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        figure, axes = subplots(1, 2)
        arms = list(results.arms.values())
        sent = [float(runs[0].summary["bytes_up"]) for runs in arms]
        measures = {
            results.score.axis: [[run.after for run in runs] for runs in arms],
            _DRIFT: [[run.extra for run in runs] for runs in arms],
        }
        for axis, (shown, values) in zip(axes, measures.items(), strict=True):
            by_seed = [list(zip(sent, seed, strict=True)) for seed in zip(*values, strict=True)]
            mean_line(axis, by_seed, "C0", "mean over seeds, and each seed")
            for x, arm_values, name in zip(sent, values, results.arms, strict=True):
                axis.annotate(
                    name, (x, statistics.fmean(arm_values)), textcoords="offset points", xytext=(3, 6), fontsize=8
                )
            axis.set(xscale="log", xlabel="bytes up", ylabel=shown)
            axis.tick_params(axis="x", which="minor", labelbottom=False)
        save_figure(figure, axes, path)


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
