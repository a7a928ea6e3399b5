"""Many steps in one pass over the masked elements, against one pass a step: ``replay`` and ``inner``."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import stream
from ..engine.backend import resolve
from ..engine.mask import SparseMask
from ..engine.weights import MaskedWeights
from .kernels import SEED, CheckError, bits_of
from .measure import Spread, Stopwatch

_REPEATS = 5


def measure_one_pass(model: nn.Module, density: float, steps: int) -> dict[str, Any]:
    """Checks that all ways have the same bits, then times them in turn.

    Args:
        model: its masked weights are written.
        density: of the mask.
        steps: (seed, coefficient) pairs replayed, and seeds of the inner products.

    Returns:
        Under "replay" and "inner", the seconds of each way and its ratio to those of one pass; the number of masked
        elements and steps.

    Raises:
        CheckError: if the bits differ.
    """
    device = next(model.parameters()).device
    mask = SparseMask.random(model, density, SEED)
    seeds, c = [stream.step_seed(SEED, 0, t) for t in range(steps)], [1e-6 * (1 + t % 7) for t in range(steps)]
    weights = MaskedWeights(model, mask)
    masters, at = weights.masters(), weights.values.seeds(seeds)
    coefficients = [weights.values.numbers([value], torch.float32) for value in c]
    ids, ops = mask.ids.to(device), resolve("auto", device)
    gradient = ops.normal(SEED, ids)

    def update_by_update() -> None:
        for t in range(steps):
            weights.update_(at[t : t + 1], coefficients[t])

    ways: dict[str, dict[str, Callable[[], Tensor | None]]] = {
        "replay": {"one pass": lambda: weights.replay_(seeds, c), "a pass a step": update_by_update},
        "inner": {
            "one pass": lambda: ops.inner(gradient, ids, at),
            "a pass a step": lambda: torch.cat([ops.inner(gradient, ids, at[t : t + 1]) for t in range(steps)]),
        },
    }
    plain = [MaskedWeights(model, mask, "torch")] if device.type == "cpu" else []
    if plain:
        ways["replay"]["one pass, plain torch"] = lambda: plain[0].replay_(seeds, c)
        ways["inner"]["one pass, plain torch"] = lambda: resolve("torch", device).inner(gradient, ids, at)

    def end(way: Callable[[], Tensor | None]) -> Tensor:
        for each in (weights, *plain):
            each.set_masters_(masters)
        found = way()
        return _live(model) if found is None else found

    record: dict[str, Any] = {"density": density, "elements": len(mask), "steps": steps}
    for name, of_name in ways.items():
        ends = [end(way) for way in of_name.values()]
        if not all(torch.equal(bits_of(ends[0]), bits_of(other)) for other in ends[1:]):
            raise CheckError(f"{name}: one pass and a pass a step end on other bits")
        record[name] = _timed(of_name, Stopwatch(device))
    weights.set_masters_(masters)
    return record


def _live(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def _timed(ways: dict[str, Callable[[], Tensor | None]], watch: Stopwatch) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(_REPEATS):
        for way, action in ways.items():
            seconds[way].append(watch.seconds(watch.cold(action)))
    return {
        way: {
            "seconds": asdict(Spread.of(values)),
            "ratio": asdict(Spread.of([x / one for x, one in zip(values, seconds["one pass"], strict=True)])),
        }
        for way, values in seconds.items()
    }


__all__ = ["measure_one_pass"]
