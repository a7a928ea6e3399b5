"""(f) How few elements matter: mean squared gradient of the top 0.1% over the next 0.9% (paper: 52).

Reference: Meerkat, arXiv 2506.03337, section 3.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...engine.errors import ConfigError
from ...engine.lm.objective import language_model_loss
from ...engine.mask_coverage import concentration
from ...engine.sensitivity import Sensitivity, accumulate, largest
from ...fed.config.run_config import RunConfig
from ...fed.setup.mask import calibration_batches
from ...fed.setup.model import load_language_model
from ..tables import over_seeds, table
from .figures import finished, mean_line, subplots
from .grid import Experiment, Results

_SHARES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Concentration(Experiment):
    """How the squared gradient of pre-training text is spread over the elements."""

    name = "concentration"
    title = "How few elements hold the squared gradient of pre-training text?"

    def measure(self, configs: Sequence[RunConfig], tasks: Sequence[str]) -> Any:
        """Ratio and cumulative shares; one each for disjoint parts of the text, as many as there are seeds."""
        config = configs[0]
        lm = load_language_model(config)
        batches, calibration = calibration_batches(config, lm)
        if len(batches) < len(configs):
            raise ConfigError(f"{len(batches)} calibration batches make no {len(configs)} parts; give more texts")
        found: dict[str, Any] = {"model": config.model.source, "calibration": calibration, "ratios": [], "held": []}
        for part in range(len(configs)):
            squares = accumulate(lm.model, batches[part :: len(configs)], language_model_loss)
            found["elements"] = sum(square.numel() for square in squares.squares)
            found["ratios"].append(concentration(squares))
            found["held"].append(_held(squares))
        return found

    def table(self, results: Results) -> str:
        """See ``Experiment``."""
        found = results.measured
        lines = [["top 0.1% over the next 0.9%, mean squared gradient", over_seeds(found["ratios"], 1)]]
        for i, share in enumerate(_SHARES):
            held = [100 * of_part[i] for of_part in found["held"]]
            lines.append([f"the top {share:.4%} of the elements hold".replace("00%", "%"), over_seeds(held, 1) + "%"])
        return table([f"{found['model']}, {found['elements']:,} elements", "mean ± sd over parts of the text"], lines)

    def draw(self, results: Results, path: Path) -> None:
        """See ``Experiment``."""
        figure, axes = subplots(1, 1)
        curves = [list(zip(_SHARES, held, strict=True)) for held in results.measured["held"]]
        mean_line(axes[0], curves, "C0", results.measured["model"])
        axes[0].set(xscale="log", xlabel="share of the elements, largest first", ylabel="share of the squared gradient")
        finished(figure, axes, path)


def _held(found: Sensitivity) -> list[float]:
    """What the largest elements hold of the squared gradient, for each of the shares."""
    size = sum(square.numel() for square in found.squares)
    counts = [max(1, round(share * size)) for share in _SHARES]
    _, best = largest(lambda i: found.squares[i].view(-1), len(found.squares), counts[-1])
    running = best.sort(descending=True).values.cumsum(0, dtype=torch.float64)
    total = sum(float(square.sum(dtype=torch.float64)) for square in found.squares)
    return [float(running[count - 1]) / total for count in counts]


__all__ = ["Concentration"]
