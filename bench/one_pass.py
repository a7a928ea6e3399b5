"""Times many steps in one pass over the masked elements against one pass per step, for ``replay`` and ``inner``."""

import copy
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
    """Checks that all variants give the same bits, then times them in turn.

    Args:
        model: the model; its masked weights are overwritten.
        density: density of the mask.
        steps: number of (seed, coefficient) pairs to replay, and of seeds for the inner products.

    Returns:
        Under "replay" and "inner", the seconds of each variant and the ratio to those of one pass; also the density,
        the number of masked elements and the number of steps.

    Raises:
        CheckError: if the bits of two variants differ.
    """
    device = next(model.parameters()).device
    mask = SparseMask.random(model, density, SEED)
    seeds, c = [stream.step_seed(SEED, 0, t) for t in range(steps)], [1e-6 * (1 + t % 7) for t in range(steps)]
    weights = MaskedWeights(model, mask)
    masters, device_seeds = weights.masters(), weights.values.seeds(seeds)
    coefficients = [weights.values.numbers([value], torch.float32) for value in c]
    ids, backend = mask.ids.to(device), resolve("auto", device)
    gradient = backend.normal(SEED, ids)

    def update_each_step() -> None:
        for t in range(steps):
            weights.update_(device_seeds[t : t + 1], coefficients[t])

    # Per operation its variants. A replay changes the weights and returns None; an inner product returns its values.
    variants: dict[str, dict[str, Callable[[], Tensor | None]]] = {
        "replay": {"one pass": lambda: weights.replay_(seeds, c), "a pass a step": update_each_step},
        "inner": {
            "one pass": lambda: backend.inner(gradient, ids, device_seeds),
            "a pass a step": lambda: torch.cat(
                [backend.inner(gradient, ids, device_seeds[t : t + 1]) for t in range(steps)]
            ),
        },
    }
    masked = {"one pass": weights, "a pass a step": weights}
    if device.type == "cpu":
        plain = masked["one pass, plain torch"] = MaskedWeights(copy.deepcopy(model), mask, "torch")
        variants["replay"]["one pass, plain torch"] = lambda: plain.replay_(seeds, c)
        variants["inner"]["one pass, plain torch"] = lambda: resolve("torch", device).inner(gradient, ids, device_seeds)

    def result_of(name: str, variant: Callable[[], Tensor | None]) -> Tensor:
        masked[name].set_masters_(masters)
        returned = variant()
        return masked[name].live() if returned is None else returned

    record: dict[str, Any] = {"density": density, "elements": len(mask), "steps": steps}
    for operation, actions in variants.items():
        first, *others = [result_of(name, action) for name, action in actions.items()]
        if not all(torch.equal(bits_of(first), bits_of(other)) for other in others):
            raise CheckError(f"{operation}: one pass and a pass a step give different bits")
        record[operation] = _time_variants(actions, Stopwatch(device))
    weights.set_masters_(masters)
    return record


def _time_variants(variants: dict[str, Callable[[], Tensor | None]], watch: Stopwatch) -> dict[str, Any]:
    """Returns the spread of each variant's seconds, and of their ratio to those of "one pass"."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(_REPEATS):
        for name, action in variants.items():
            seconds[name].append(watch.seconds(watch.cold(action)))
    return {
        name: {
            "seconds": asdict(Spread.of(values)),
            "ratio": asdict(Spread.of([x / one for x, one in zip(values, seconds["one pass"], strict=True)])),
        }
        for name, values in seconds.items()
    }


__all__ = ["measure_one_pass"]
