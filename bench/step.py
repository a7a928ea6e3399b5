"""Times a complete step by part: perturb, forward, flip, second forward, update."""

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
_SLOW, _REPEATS_OF_SLOW = 2.0, 3  # a row is slow if its first step takes more than _SLOW seconds
_ROWS = ("meerkat", "torch indexing", "dense, fused noise", "dense, one flat noise vector", "dense, MeZO's loop")


def make_closure(net: nn.Module, batch_size: int, length: int) -> Callable[[], Tensor]:
    """Returns a closure that computes the loss at the last position of a batch of random tokens.

    Args:
        net: a transformers causal language model.
        batch_size: number of examples.
        length: number of tokens per example.
    """
    vocabulary: int = net.config.vocab_size  # type: ignore[union-attr, assignment]
    tokens = stream.bits(SEED, torch.arange(batch_size * length, device="cpu"))[:, 0] % vocabulary
    ids = tokens.view(batch_size, length).to(next(net.parameters()).device)

    @torch.inference_mode()
    def closure() -> Tensor:
        logits = net(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1]
        return functional.cross_entropy(logits.float(), ids[:, 0])

    return closure


def measure_parts(
    model: nn.Module, density: float, closure: Callable[[], Tensor], repeats: int
) -> list[dict[str, Any]]:
    """Checks the rows in ``_ROWS`` and times the parts of their steps. Each repetition times all rows in turn.

    Args:
        model: the model; a few small updates change its weights.
        density: density of the sparse rows' mask.
        closure: runs one forward pass and returns the loss.
        repeats: number of repetitions, at least 3; a slow row is timed in the first 3.

    Returns:
        One record per row, ready for JSON: seconds and share of each part, and the step's time divided by that of its
        two forwards. The record of a row whose check failed has the reason and no numbers.
    """
    mask, d = SparseMask.random(model, density, SEED), sum(p.numel() for p in model.parameters())

    def make_entry(name: str) -> Entry:
        if name in SPARSE:
            return Entry(name=name, density=density, elements=len(mask), row=SPARSE[name](model, mask))
        return Entry(name=name, density=1.0, elements=d, row=DENSE[name](model))

    watch = Stopwatch(next(model.parameters()).device)
    records: list[dict[str, Any]] = []
    passed: list[tuple[Entry, dict[str, list[float]]]] = []
    for name in _ROWS:
        entry = make_entry(name)
        try:
            check(entry, model)
            # Built again: the check changed the first one's state.
            passed.append((make_entry(name), {part: [] for part in PARTS}))
        except CheckError as error:
            records.append({"row": entry.name, "density": entry.density, "failed": str(error)})
    closure()  # warm-up
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
            elapsed = [watch.seconds(moment) for moment in moments]
            row.end_step()
            for part, value in zip(PARTS, elapsed, strict=True):
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
        "over_forwards": asdict(Spread.of([step / pair for step, pair in zip(steps, forwards, strict=True)])),
    }


def measure_optimizer(model: nn.Module, density: float, closure: Callable[[], Tensor], repeats: int) -> dict[str, Any]:
    """Times ``SparseZO.step``, with its seeds, coefficients and checks, relative to the two forwards in it.

    Args:
        model: the model; a few small updates change its weights.
        density: density of the mask.
        closure: runs one forward pass and returns the loss.
        repeats: number of steps, at least 3; one more step comes first as warm-up.

    Returns:
        Under "over_forwards", the spread of the step's time divided by that of its two forwards.
    """
    clock = Clock(next(model.parameters()).device)
    optimizer = SparseZO(model, SparseMask.random(model, density, SEED), lr=C, eps=EPS, seed=SEED)
    forwards: list[tuple[Any, Any]] = []

    def timed_closure() -> Tensor:
        start = clock.now()
        loss = closure()
        forwards.append((start, clock.now()))
        return loss

    steps = []
    for _ in range(1 + repeats):  # the first step is the warm-up
        start = clock.now()
        optimizer.step(timed_closure)
        steps.append((start, clock.now()))
    seconds = [clock.seconds(*step) for step in steps]
    in_forwards = [clock.seconds(*forwards[2 * i]) + clock.seconds(*forwards[2 * i + 1]) for i in range(1 + repeats)]
    ratios = [step / pair for step, pair in zip(seconds, in_forwards, strict=True)]
    return {"over_forwards": asdict(Spread.of(ratios[1:]))}


__all__ = ["PARTS", "make_closure", "measure_optimizer", "measure_parts"]
