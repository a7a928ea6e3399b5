"""Experiment (b), GradIP: GradIP, gradient norm and cosine along the paths of IID and of single-label clients.

References:
    Meerkat, arXiv 2506.03337, section 4.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...fed.config.run_config import RunConfig
from ...fed.ledger.file import read_ledger
from ...fed.run.directory import LEDGER
from ...fed.run.gradip_file import read_gradip
from ..figures import mean_line, save_figure, subplots
from ..tables import over_seeds, table
from .experiment import Arm, Experiment, Results, Settings
from .finished import FinishedRun

_KINDS = {"IID": {"partition": "iid"}, "single label": {"partition": "single-label"}}
# All clients share z, so the absolute cosine is the same for all of them: only its sign depends on the client.
_QUANTITIES = {"gradip": "GradIP, absolute", "norm": "gradient norm", "cosine": "cosine, signed"}
_SMOOTH = 10  # one point of the figure is a mean over this many steps


class GradIPPaths(Experiment):
    """GradIP along the virtual paths of IID clients and of single-label clients."""

    name = "gradip"
    title = "GradIP, gradient norm and cosine of a client's path over 100 steps, as computed by the server"
    settings: ClassVar[Settings] = {"rounds": 1, "local_steps": 1, "vp_steps": 100}
    sets = ("method", "partition")

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """Returns one arm per kind of client."""
        return [Arm(name=name, settings={"method": "meerkat-vp", **settings}) for name, settings in _KINDS.items()]

    def extra(self, directory: Path) -> Any:
        """Returns GradIP, gradient norm and cosine of the clients, one object per round, as in ``gradip.jsonl``."""
        return read_gradip(directory, read_ledger(directory / LEDGER))

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        lines = []
        for key, shown in _QUANTITIES.items():
            for kind, runs in results.arms.items():
                first, last = (
                    [statistics.fmean(path[part]) for path in _paths(runs, key)] for part in _windows(runs[0])
                )
                ratios = [a / b for a, b in zip(first, last, strict=True)]
                ratio = "" if key == "cosine" else over_seeds(ratios, 2)
                lines.append([shown, kind, f"{statistics.fmean(first):.3g}", f"{statistics.fmean(last):.3g}", ratio])
        config = results.arms["IID"][0].config
        columns = ["", "clients", f"first {config['vp_initial']} steps", f"last {config['vp_later']}",
                   "ratio, over clients and seeds"]  # fmt: skip
        return table(columns, lines)

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        figure, axes = subplots(1, len(_QUANTITIES))
        for axis, (key, shown) in zip(axes, _QUANTITIES.items(), strict=True):
            for i, (kind, runs) in enumerate(results.arms.items()):
                mean_line(axis, [_smoothed(path) for path in _paths(runs, key)], f"C{i}", f"{kind} clients")
            axis.set(title=shown, xlabel="local step", yscale="linear" if key == "cosine" else "log")
        save_figure(figure, axes, path)


def _paths(runs: Sequence[FinishedRun], key: str) -> list[list[float]]:
    """Returns the values along the path of every client of every seed: absolute values, except for the cosine."""
    clients = [client for run in runs for client in run.extra[0]["clients"].values()]
    return [client[key] if key == "cosine" else [abs(x) for x in client[key]] for client in clients]


def _windows(run: FinishedRun) -> tuple[slice, slice]:
    """Returns the steps of the initial and of the later window."""
    return slice(run.config["vp_initial"]), slice(-run.config["vp_later"], None)


def _smoothed(path: Sequence[float]) -> list[tuple[float, float]]:
    """Returns points (step, mean) over windows of ``_SMOOTH`` steps."""
    starts = range(0, len(path) - _SMOOTH + 1, _SMOOTH)
    return [(start + (_SMOOTH + 1) / 2, statistics.fmean(path[start : start + _SMOOTH])) for start in starts]


__all__ = ["GradIPPaths"]
