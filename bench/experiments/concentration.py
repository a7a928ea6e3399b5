"""Experiment (f), concentration: mean squared gradient of the top 0.1% of the elements over the next 0.9% (paper: 52).

References:
    Meerkat, arXiv 2506.03337, section 3.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...engine.errors import ConfigError
from ...engine.lm.text_loss import language_model_loss
from ...engine.mask_coverage import concentration
from ...engine.sensitivity import Sensitivity, accumulate_gradients, select_largest
from ...fed.config.run_config import RunConfig
from ...fed.setup.mask import calibration_batches
from ...fed.setup.model import load_language_model
from ..figures import mean_line, save_figure, subplots
from ..tables import over_seeds, table
from .experiment import Experiment, Results

_SHARES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Concentration(Experiment):
    """The distribution of the squared gradient of pre-training text over the elements."""

    name = "concentration"
    title = "How few elements hold the squared gradient of pre-training text?"

    def measure(self, configs: Sequence[RunConfig], tasks: Sequence[str]) -> Any:
        """Returns the ratio and the cumulative shares of each part of the text; there are as many parts as seeds."""
        config = configs[0]
        lm = load_language_model(config)
        batches, calibration = calibration_batches(config, lm)
        if len(batches) < len(configs):
            raise ConfigError(
                f"the calibration text has {len(batches)} batch(es), but {len(configs)} seeds need one each; "
                "increase --calibration-texts or reduce --seeds"
            )
        measured: dict[str, Any] = {"model": config.model.source, "calibration": calibration, "ratios": [], "held": []}
        for part in range(len(configs)):
            sensitivity = accumulate_gradients(lm.model, batches[part :: len(configs)], language_model_loss)
            measured["elements"] = sum(square.numel() for square in sensitivity.squares.values())
            measured["ratios"].append(concentration(sensitivity))
            measured["held"].append(_held_shares(sensitivity))
        return measured

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        measured = results.measured
        lines = [["top 0.1% over the next 0.9%, mean squared gradient", over_seeds(measured["ratios"], 1)]]
        for i, share in enumerate(_SHARES):
            held = [100 * shares[i] for shares in measured["held"]]
            lines.append([f"the top {share:.4%} of the elements hold".replace("00%", "%"), over_seeds(held, 1) + "%"])
        return table(
            [f"{measured['model']}, {measured['elements']:,} elements", "mean ± sd over parts of the text"], lines
        )

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        figure, axes = subplots(1, 1)
        curves = [list(zip(_SHARES, held, strict=True)) for held in results.measured["held"]]
        mean_line(axes[0], curves, "C0", results.measured["model"])
        axes[0].set(xscale="log", xlabel="share of the elements, largest first", ylabel="share of the squared gradient")
        save_figure(figure, axes, path)


def _held_shares(sensitivity: Sensitivity) -> list[float]:
    """Returns the share of the squared gradient in the largest elements, for each share of the elements."""
    squares = list(sensitivity.squares.values())
    size = sum(square.numel() for square in squares)
    counts = [max(1, round(share * size)) for share in _SHARES]
    _, values = select_largest(squares, counts[-1])
    cumulative = values.sort(descending=True).values.cumsum(0, dtype=torch.float64)
    total = sum(float(square.sum(dtype=torch.float64)) for square in squares)
    return [float(cumulative[count - 1]) / total for count in counts]


__all__ = ["Concentration"]
