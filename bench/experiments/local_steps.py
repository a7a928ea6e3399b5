"""(d) How often to talk: local steps at equal total steps, drift against communication (paper: section 5).

A client's drift in a round is the distance of its end from the average, which its scalars tell without a weight:

    | sum_t lr_t (g_i^t - g^t) z_t |  =  sqrt(k sum_t (lr_t (g_i^t - g^t))**2)        (z_t nearly orthogonal)
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
from .figures import finished, mean_line, subplots
from .grid import Arm, Experiment, Finished, Results, Settings

_LOCAL_STEPS = (1, 10, 30, 50, 100)
_DRIFT = "drift of a client in a round"


class LocalSteps(Experiment):
    """Local steps at equal total steps."""

    name = "local-steps"
    title = "How often to talk? T local steps a round at equal total steps: drift against communication"
    settings: ClassVar[Settings] = {"rounds": 30, "local_steps": 10, "partition": "dirichlet", "alpha": 0.3}

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """A T each, of those that divide the steps of a client in all."""
        if config.method.recipe.sends_weights:
            raise ConfigError(f"drift is read from the clients' scalars, and {config.method} has none")
        total = config.rounds * config.local_steps
        fitting = [steps for steps in _LOCAL_STEPS if total % steps == 0]
        if len(fitting) < 2:
            raise ConfigError(
                f"{total} steps of a client (rounds times local_steps) cannot be dealt in two ways of "
                f"{', '.join(map(str, _LOCAL_STEPS))}; a multiple of 300 can in all"
            )
        return [
            Arm(name=f"T = {steps}", settings={"local_steps": steps, "rounds": total // steps}) for steps in fitting
        ]

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        lines = []
        for arm, runs in results.arms.items():
            losses = [run.validation_loss for run in runs]
            sent = [amount(runs[0].summary[f"bytes_{way}"]) for way in ("up", "down")]
            drift, accuracy = over_seeds([_drift(run) for run in runs]), over_seeds(results.accuracy(arm))
            lines.append([arm, str(runs[0].config["rounds"]), accuracy, over_seeds(losses), drift, *sent])
        return table(["", "rounds", "accuracy after", "validation loss", _DRIFT, "bytes up", "down"], lines)

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        figure, axes = subplots(1, 2)
        arms = list(results.arms.values())
        sent = [float(runs[0].summary["bytes_up"]) for runs in arms]
        measures = {
            "accuracy on held-out examples": [[float(run.summary["accuracy_after"]) for run in runs] for runs in arms],
            _DRIFT: [[_drift(run) for run in runs] for runs in arms],
        }
        for axis, (shown, values) in zip(axes, measures.items(), strict=True):
            by_seed = [list(zip(sent, seed, strict=True)) for seed in zip(*values, strict=True)]
            mean_line(axis, by_seed, "C0", "mean over seeds, and each seed")
            for x, of_arm, name in zip(sent, values, results.arms, strict=True):
                axis.annotate(
                    name, (x, statistics.fmean(of_arm)), textcoords="offset points", xytext=(3, 6), fontsize=8
                )
            axis.set(xscale="log", xlabel="bytes up", ylabel=shown)
            axis.tick_params(axis="x", which="minor", labelbottom=False)
        finished(figure, axes, path)


def _drift(run: Finished) -> float:
    """Distance of a client's end from the average: root mean square over clients and rounds."""
    ledger = read_ledger(run.directory / LEDGER)
    terms = ledger.header.terms
    squares = [square for line in ledger.rounds for square in _squares(line, terms.query_learning_rates(line.round))]
    return math.sqrt(terms.elements * statistics.fmean(squares))


def _squares(line: RoundRecord, rates: list[float]) -> list[float]:
    """``sum_t (lr_t (g_i^t - g^t))**2`` of each client, who contributes 0 where it took no step."""
    return [
        sum(
            (lr * (g - mean)) ** 2
            for lr, g, mean in zip(rates, [*own, *[0.0] * (len(rates) - len(own))], line.scalars, strict=True)
        )
        for own in line.clients.values()
    ]


__all__ = ["LocalSteps"]
