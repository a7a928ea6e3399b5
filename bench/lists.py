"""Many steps in one pass over the masked elements, against one pass a step: ``replay`` and ``inner``."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .. import SparseMask, stream
from ..backend import resolve
from ..weights import MaskedWeights
from .kernels import SEED, CheckError
from .measure import Spread, Stopwatch

_REPEATS = 5


def in_one_pass(model: nn.Module, density: float, steps: int) -> dict[str, Any]:
    """Checks that both ways have the same bits, then times them in turn.

    Args:
        model: its masked weights are written.
        density: of the mask.
        steps: (seed, coefficient) pairs replayed, and seeds of the inner products.

    Returns:
        Seconds of each way, the ratio of one pass to a pass a step, and the number of masked elements and steps.

    Raises:
        CheckError: if the bits differ.
    """
    device = next(model.parameters()).device
    mask = SparseMask.random(model, density, SEED)
    weights, ids = MaskedWeights(model, mask), mask.ids.to(device)
    ops, masters = resolve("auto", device), weights.masters()
    gradient = stream.normal(SEED, ids)
    seeds, c = [stream.step_seed(SEED, 0, t) for t in range(steps)], [1e-6 * (1 + t % 7) for t in range(steps)]
    on_device = weights.values.seeds(seeds)
    coefficients = [weights.values.numbers([value], torch.float32) for value in c]

    def update_by_update() -> None:
        for t in range(steps):
            weights.update_(on_device[t : t + 1], coefficients[t])

    ways: dict[str, tuple[Callable[[], Tensor | None], Callable[[], Tensor | None]]] = {
        "replay": (lambda: weights.replay_(seeds, c), update_by_update),
        "inner": (
            lambda: ops.inner(gradient, ids, on_device),
            lambda: torch.cat([ops.inner(gradient, ids, on_device[t : t + 1]) for t in range(steps)]),
        ),
    }
    watch = Stopwatch(device)
    record: dict[str, Any] = {"density": density, "elements": len(mask), "steps": steps}
    for name, pair in ways.items():
        ends = []
        for way in pair:
            weights.set_masters_(masters)
            found = way()
            ends.append(weights.masters() if found is None else found)
        if not torch.equal(*ends):
            raise CheckError(f"{name}: one pass and a pass a step end on other bits")
        seconds: list[list[float]] = [[], []]
        for _ in range(_REPEATS):
            for way, mine in zip(pair, seconds, strict=True):
                mine.append(watch.seconds(watch.cold(way)))
        record[name] = {
            "one_pass_seconds": asdict(Spread.of(seconds[0])),
            "pass_a_step_seconds": asdict(Spread.of(seconds[1])),
            "ratio": asdict(Spread.of([one / many for one, many in zip(*seconds, strict=True)])),
        }
    weights.set_masters_(masters)
    return record


__all__ = ["in_one_pass"]
