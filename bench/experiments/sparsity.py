"""Experiment (a), sparsity: accuracy against bytes for masks of four densities, with IID and with non-IID clients.

References:
    Meerkat, arXiv 2506.03337, section 5 (sparsity).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ...fed.config.run_config import RunConfig
from ..figures import mean_line, save_figure, subplots
from ..tables import amount, over_seeds, table
from .experiment import Arm, Experiment, Results, Settings
from .finished import FinishedRun

_DENSITIES = (1e-2, 1e-3, 1e-4, 1e-5)
_PARTITIONS: dict[str, Settings] = {
    "iid": {"partition": "iid"},
    "Dirichlet 0.5": {"partition": "dirichlet", "alpha": 0.5},
}


class Sparsity(Experiment):
    """Accuracy against bytes for masks of four densities."""

    name = "sparsity"
    title = "How sparse may the mask be? Accuracy and bytes for four densities"
    settings: ClassVar[Settings] = {"eval_every": 2}
    sets = ("partition", "alpha", "mask")

    def arms(self, config: RunConfig, tasks: Sequence[str]) -> Sequence[Arm]:
        """Returns one arm per density and partition: the fewer the elements, the larger the learning rate."""
        return [
            Arm(
                name=f"{partition}, u = {density:g}",
                settings={
                    **settings,
                    "density": density,
                    "lr": config.step.lr * (config.mask.density / density) ** 0.5,
                },
            )
            for partition, settings in _PARTITIONS.items()
            for density in _DENSITIES
        ]

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        lines = []
        for arm, runs in results.arms.items():
            summary = runs[0].summary
            lines.append([
                arm, f"{summary['masked_elements']:,}", f"{runs[0].config['lr']:.3g}",
                over_seeds([run.before for run in runs]), over_seeds(results.after(arm)),
                amount(summary["mask_bytes"]), amount(summary["bytes_up"] + summary["bytes_down"]),
            ])  # fmt: skip
        before = f"{results.score.title} before"
        return table(["", "elements", "lr", before, "after", "mask, once a client", "all messages"], lines)

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        figure, axes = subplots(1, len(_PARTITIONS), sharey=True)
        for axis, partition in zip(axes, _PARTITIONS, strict=True):
            for i, density in enumerate(_DENSITIES):
                runs = results.arms[f"{partition}, u = {density:g}"]
                mean_line(axis, [_curve(run) for run in runs], f"C{i}", f"u = {density:g}")
            axis.set(title=partition, xscale="log", xlabel="bytes sent, masks included")
        axes[0].set_ylabel(results.score.axis)
        save_figure(figure, axes, path)


def _curve(run: FinishedRun) -> list[tuple[float, float]]:
    """Returns points (bytes sent so far, main score), one per evaluation."""
    sent, points, by_round = run.summary["mask_bytes"] * run.config["clients"], [], dict(run.curve)
    for line in run.lines:
        sent += line["bytes_up"] + line["bytes_down"]
        if line["round"] in by_round:
            points.append((float(sent), by_round[line["round"]]))
    return points


__all__ = ["Sparsity"]
