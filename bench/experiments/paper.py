"""Experiment (h), the paper's table: methods compared at equal steps, with learning rates tuned alike, paired by seed.

References:
    Meerkat, arXiv 2506.03337, section 5 and table of LLaMA-3.2-1B, non-IID, T = 10; MeZO, arXiv 2305.17333 (eps of
    adapters).
"""

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...engine.errors import ConfigError
from ...fed.config.run_config import RunConfig
from ...fed.methods import Gradient, Method, Stopping
from ..figures import mean_line, save_figure, subplots
from ..tables import amount, over_seeds, table
from .experiment import Arm, Experiment, Results, Search, Settings
from .finished import FinishedRun
from .paired import after_of, loss_of, paired_difference, shown

_REFERENCE = Method.MEERKAT
_METHODS = (
    Method.MEERKAT,
    Method.MEERKAT_VP,
    Method.WEIGHT_MAGNITUDE,
    Method.LORA_FEDZO,
    Method.FULL_FEDZO,
    Method.DECOMFL,
    Method.FEDAVG,
)
_LOCAL_STEPS = (10, 1)
_SEARCH_SEED = 1000  # its partition, batches and perturbations are those of no run of the table
_SEARCH_EXAMPLES = 200
_EVALUATIONS = 3
_LORA_EPS = 1e-2  # MeZO's for adapters: their B begins at 0, and a perturbation of 1e-3 hardly moves the loss
# LLaMA-3.2-1B, non-IID, T = 10, thousands of steps: accuracy by task.
_PAPER = {
    "sst2": {"full-fedzo": 0.909, "lora-fedzo": 0.901, "weight-magnitude": 0.902, "meerkat": 0.916},
    "ag_news": {"full-fedzo": 0.705, "lora-fedzo": 0.749, "weight-magnitude": 0.857, "meerkat": 0.872},
    "yelp_polarity": {"full-fedzo": 0.940, "lora-fedzo": 0.960, "weight-magnitude": 0.951, "meerkat": 0.964},
    "boolq": {"full-fedzo": 0.641, "lora-fedzo": 0.649, "weight-magnitude": 0.696, "meerkat": 0.695},
    "rte": {"full-fedzo": 0.542, "lora-fedzo": 0.524, "weight-magnitude": 0.551, "meerkat": 0.600},
}


class Paper(Experiment):
    """The paper's table: seven methods, at T = 10 and T = 1."""

    name = "paper"
    title = "Which method trains best at equal steps, with learning rates tuned alike?"
    settings: ClassVar[Settings] = {"rounds": 15, "local_steps": 10, "partition": "dirichlet", "alpha": 0.5}
    sets = ("method", "lr", "queries", "mask")
    takes_part = True

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """Returns one arm per T and method. Methods without early stopping have the learning rate of a search."""
        total = config.rounds * config.local_steps
        if total % (10 * 3):
            raise ConfigError(
                f"rounds times local_steps is {total}; it must be a multiple of 30, so that T = 10 divides it and "
                f"decomfl has as many forward passes as the others"
            )
        return [
            Arm(name=f"T = {steps}, {method}", settings=_evaluated(method, steps, total), search=_search(method, total))
            for steps in _LOCAL_STEPS
            for method in _METHODS
            if steps > 1 or method.recipe.stopping is Stopping.NONE  # at T = 1 no step is left to stop before
        ]

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        return "\n\n".join(_table(results, steps) for steps in _LOCAL_STEPS if _arms(results, steps))

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        shown = [steps for steps in _LOCAL_STEPS if _arms(results, steps)]
        figure, axes = subplots(len(shown), len(_COSTS))
        for (steps, (cost, of_line)), axis in zip(itertools.product(shown, _COSTS.items()), axes, strict=True):
            for method, runs in _arms(results, steps).items():
                curves = [_curve(run, of_line) for run in runs]
                mean_line(axis, curves, f"C{_METHODS.index(Method(method))}", method)
            axis.set(title=f"T = {steps}", xlabel=cost, ylabel=results.score.axis)
            if cost == _BYTES:
                axis.set(xscale="symlog")
        save_figure(figure, axes, path)


def _settings(method: Method, steps: int, total: int) -> dict[str, Any]:
    """What defines an arm. A step of decomfl with 5 perturbations has 6 forward passes: a third of the steps."""
    rounds = total // steps // (3 if method is Method.DECOMFL else 1)
    eps = {"eps": _LORA_EPS} if method is Method.LORA_FEDZO else {}
    return {"method": str(method), "local_steps": steps, "rounds": rounds, **eps}


def _evaluated(method: Method, steps: int, total: int) -> dict[str, Any]:
    """The settings of an arm, which is evaluated ``_EVALUATIONS`` times."""
    settings = _settings(method, steps, total)
    return {**settings, "eval_every": max(1, settings["rounds"] // _EVALUATIONS)}


def _search(method: Method, total: int) -> Search:
    """The search for the learning rate of a method, at T = 10. Early stopping has the rate of the method without it."""
    of = _REFERENCE if method.recipe.stopping is not Stopping.NONE else method
    settings = {**_settings(of, 10, total), "seed": _SEARCH_SEED, "eval_examples": _SEARCH_EXAMPLES}
    return Search(name=str(of), settings=settings)


def _arms(results: Results, steps: int) -> dict[str, list[FinishedRun]]:
    """The runs with ``T = steps`` by method."""
    start = f"T = {steps}, "
    return {name.removeprefix(start): runs for name, runs in results.arms.items() if name.startswith(start)}


def _table(results: Results, steps: int) -> str:
    """The table of one T."""
    arms = _arms(results, steps)
    reference = arms.get(str(_REFERENCE), [])
    lines = []
    for method, runs in arms.items():
        apart = [
            "" if runs is reference else shown(paired_difference(runs, reference, value))
            for value in (after_of, loss_of)
        ]
        first = runs[0]
        seconds = [_total(run, "seconds_in_steps") for run in runs]
        lines.append([
            method, f"{first.config['lr']:g}", str(len(runs)),
            over_seeds([run.after for run in runs]), over_seeds([run.validation_loss for run in runs]), *apart,
            f"{_forwards(first):,.0f}", amount(_total(first, "bytes_up") + _total(first, "bytes_down")),
            f"{statistics.fmean(seconds):.0f} s", *_published(first, method),
        ])  # fmt: skip
    score = results.score.title
    columns = [f"T = {steps}", "lr", "seeds", f"{score} after", "loss", f"{score} - {_REFERENCE}'s", "loss - its",
               "forwards a client", "messages", "time in steps, all clients"]  # fmt: skip
    if len(lines[0]) > len(columns):
        columns.append("paper, a larger model")
    before = over_seeds([run.before for runs in arms.values() for run in runs][:1])
    return f"{score} before: {before}.\n\n{table(columns, lines)}"


def _published(run: FinishedRun, method: str) -> list[str]:
    """The paper's accuracy of a method, in a list; empty if the paper does not have the task."""
    published = _PAPER.get(str(run.config.get("task")))
    if published is None:
        return []
    return [f"{published[method]:.3f}" if method in published else ""]


def _forwards_of_line(run: FinishedRun, line: dict[str, Any]) -> float:
    """Forward passes of a client in a round, on average."""
    gradient: Gradient = Method(run.config["method"]).recipe.gradient
    return float(line["steps"] / run.config["clients"] * gradient.forwards(run.config["queries"]))


def _forwards(run: FinishedRun) -> float:
    """Forward passes of a client in a run, on average, calibration included."""
    return sum(_forwards_of_line(run, line) for line in run.lines)


def _total(run: FinishedRun, name: str) -> float:
    return float(sum(line[name] for line in run.lines))


def _curve(run: FinishedRun, cost: Callable[[FinishedRun, dict[str, Any]], float]) -> list[tuple[float, float]]:
    """Points (cost up to there, score), one per evaluation."""
    costs = itertools.accumulate(cost(run, line) for line in run.lines)
    return [(x, y) for x, line in zip(costs, run.lines, strict=True) if (y := line.get(run.main_score)) is not None]


_BYTES = "bytes of all messages"
_COSTS: dict[str, Callable[[FinishedRun, dict[str, Any]], float]] = {
    "local steps of a client": lambda run, line: line["steps"] / run.config["clients"],
    "forward passes of a client": _forwards_of_line,
    _BYTES: lambda run, line: line["bytes_up"] + line["bytes_down"],
    "seconds in steps, all clients": lambda run, line: line["seconds_in_steps"],
}

__all__ = ["Paper"]
