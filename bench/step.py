"""A whole step, split by part: perturb, forward, flip, forward, update."""

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..engine import stream
from ..engine.clock import Clock
from ..engine.mask import SparseMask
from ..engine.optimizer import SparseZO
from .kernels import EPS, SEED, C, CheckError, Entry, check
from .measure import Spread, Stopwatch
from .rows import DENSE, SPARSE

PARTS = ("perturb", "forward", "flip", "second forward", "update")
_SLOW, _REPEATS_OF_SLOW = 2.0, 3  # seconds of a step
_ROWS = ("meerkat", "torch indexing", "dense, fused noise", "dense, one flat noise vector", "dense, MeZO's loop")


def closure_of(net: nn.Module, batch_size: int, length: int) -> Callable[[], Tensor]:
    """Loss of a batch of random tokens, at the last position."""
    vocabulary: int = net.config.vocab_size  # type: ignore[union-attr, assignment]
    words = stream.bits(SEED, torch.arange(batch_size * length))[:, 0] % vocabulary
    ids = words.view(batch_size, length).to(next(net.parameters()).device)

    @torch.inference_mode()
    def closure() -> Tensor:
        logits = net(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1]
        return functional.cross_entropy(logits.float(), ids[:, 0])

    return closure


def split(model: nn.Module, density: float, closure: Callable[[], Tensor], repeats: int) -> list[dict[str, Any]]:
    """Checks some rows and times the parts of their steps, all in turn within every repetition.

    Args:
        model: its weights are moved by a few small updates.
        density: of the mask of the sparse rows.
        closure: one forward pass.
        repeats: at least 3; a slow row takes part in 3.

    Returns:
        For each row the seconds and shares of each part, and the step's time over its own two forwards; for a row whose
        check failed, what failed and no number.
    """
    mask, d = SparseMask.random(model, density, SEED), sum(p.numel() for p in model.parameters())

    def made(name: str) -> Entry:
        if name in SPARSE:
            return Entry(name=name, density=density, elements=len(mask), row=SPARSE[name](model, mask))
        return Entry(name=name, density=1.0, elements=d, row=DENSE[name](model))

    watch = Stopwatch(next(model.parameters()).device)
    records: list[dict[str, Any]] = []
    passed: list[tuple[Entry, dict[str, list[float]]]] = []
    for name in _ROWS:
        entry = made(name)
        try:
            check(entry, model)
            passed.append((made(name), {part: [] for part in PARTS}))  # anew: the checked one's own state has moved on
        except CheckError as error:
            records.append({"row": entry.name, "density": entry.density, "failed": str(error)})
    closure()
    for repetition in range(repeats):
        for entry, seconds in passed:
            if repetition >= _REPEATS_OF_SLOW and sum(values[0] for values in seconds.values()) > _SLOW:
                continue
            row, seed = entry.row, SEED + repetition
            actions: list[Callable[[], object]] = [
                functools.partial(row.perturb, seed, EPS),
                closure,
                functools.partial(row.flip, seed, EPS),
                closure,
                functools.partial(row.update, seed, EPS, C),
            ]
            moments = [watch.warm(action) for action in actions]
            took = [watch.seconds(at) for at in moments]
            row.settle()
            for part, value in zip(PARTS, took, strict=True):
                seconds[part].append(value)
    return [_record(entry, seconds) for entry, seconds in passed] + records


def _record(entry: Entry, seconds: dict[str, list[float]]) -> dict[str, Any]:
    steps = [sum(values) for values in zip(*seconds.values(), strict=True)]
    forwards = [a + b for a, b in zip(seconds["forward"], seconds["second forward"], strict=True)]
    return {
        "row": entry.name,
        "density": entry.density,
        "elements": entry.elements,
        "seconds": {part: asdict(Spread.of(values)) for part, values in seconds.items()},
        "share": {
            part: asdict(Spread.of([value / step for value, step in zip(values, steps, strict=True)]))
            for part, values in seconds.items()
        },
        "over_forwards": asdict(Spread.of([step / two for step, two in zip(steps, forwards, strict=True)])),
    }


def measure_optimizer(model: nn.Module, density: float, closure: Callable[[], Tensor], repeats: int) -> dict[str, Any]:
    """Times ``SparseZO.step`` itself, with its seeds, coefficients and checks, over the two forwards in it.

    Args:
        model: its weights are moved by a few small updates.
        density: of the mask.
        closure: one forward pass.
        repeats: at least 3.
    """
    clock = Clock(next(model.parameters()).device)
    optimizer = SparseZO(model, SparseMask.random(model, density, SEED), lr=C, eps=EPS, seed=SEED)
    forwards: list[tuple[Any, Any]] = []

    def timed() -> Tensor:
        begun = clock.now()
        loss = closure()
        forwards.append((begun, clock.now()))
        return loss

    steps = []
    for _ in range(1 + repeats):  # the first one warms up
        begun = clock.now()
        optimizer.step(timed)
        steps.append((begun, clock.now()))
    seconds = [clock.seconds(*step) for step in steps]
    in_forwards = [clock.seconds(*forwards[2 * i]) + clock.seconds(*forwards[2 * i + 1]) for i in range(1 + repeats)]
    ratios = [step / two for step, two in zip(seconds, in_forwards, strict=True)]
    return {"over_forwards": asdict(Spread.of(ratios[1:]))}


__all__ = ["PARTS", "closure_of", "measure_optimizer", "split"]
