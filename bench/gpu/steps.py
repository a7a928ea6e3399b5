"""Times whole steps: this engine, captured and eager, against dense zeroth-order steps and first-order fine-tuning.

All rows compute the same loss, the cross-entropy of two candidate tokens, on the same examples. This engine packs them
into rows; the others pad them to the longest, as their own code does.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...engine import stream
from ...engine.captured import BoundLoss
from ...engine.lm.batches import Batch, Item
from ...engine.lm.layout import Layout, lay_out
from ...engine.lm.objective import Objective, task_loss
from ...engine.mask import SparseMask
from ...engine.optimizer import SparseZO
from ...engine.replay import replay
from .. import shapes
from ..kernels import EPS, SEED, Entry, bits_of, check
from ..rows import DENSE, MeZO, Row
from .part import Record, part

_DENSITY, _LR = 1e-3, 1e-6
_ZEROTH_ORDER = ("dense, fused noise", "dense, one flat noise vector", "dense, MeZO's loop")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its mask, and one batch in two layouts.

    Args:
        name: name of the lengths.
        model: the model.
        mask: the mask of this engine's rows.
        packed: the batch in packed rows.
        padded: the batch padded to the longest example.
        check: whether the dense rows are checked before they are timed; once for each model.
    """

    name: str
    model: nn.Module
    mask: SparseMask
    packed: Batch
    padded: Batch
    check: bool

    @classmethod
    def make(cls, name: str, model: nn.Module, mask: SparseMask, lengths: tuple[int, ...], *, check: bool) -> "Case":
        """Makes a batch of random tokens with these lengths; the answer is one of two tokens."""
        vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
        device = next(model.parameters()).device
        words = stream.bits(SEED, torch.arange(sum(lengths), device="cpu"))[:, 0] % vocabulary
        answers = [np.array([token]) for token in (3, 4)]
        items = [Item(prompt=tokens.numpy(), answers=answers) for tokens in words.split(list(lengths))]
        labels = [i % 2 for i in range(len(items))]
        candidates = torch.tensor([3, 4], device=device)
        packed, padded = (
            lay_out(layout, items, labels, 0, device, candidates) for layout in (Layout.PACKED, Layout.PADDED)
        )
        return cls(name=name, model=model, mask=mask, packed=packed, padded=padded, check=check)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        return task_loss(self.model, batch, Objective.CANDIDATES)


@dataclass(frozen=True)
class Steps:
    """Takes a number of steps, and says afterwards what they were: fields of the record, and "log"."""

    take: Callable[[int], object]
    said: Callable[[], dict[str, Any]] = dict


def engine_steps(case: Case, capture: str, loss: Callable[[Batch], Tensor] | None = None) -> Steps:
    """Steps of this engine, several in a ``step_many``.

    Args:
        case: the case.
        capture: "auto" or "off".
        loss: computes the loss of a batch; None: ``case.loss``.
    """
    optimizer = SparseZO(case.model, case.mask, lr=_LR, eps=EPS, seed=SEED, capture=capture)
    loss_of = loss or case.loss

    def said() -> dict[str, Any]:
        return {
            "captured_steps": optimizer.captured_steps,
            "not_captured": optimizer.not_captured,
            "scalars": optimizer.projected_gradients[:4],
            "log": optimizer.log,
        }

    return Steps(lambda number: optimizer.step_many([BoundLoss(loss_of, case.packed)] * number), said)


def zeroth_order_steps(case: Case, row: Row) -> Steps:
    """Steps of an implementation that reads its scalar on the host, as MeZO's and DeComFL's code does."""

    @torch.inference_mode()
    def take(number: int) -> None:
        for t in range(number):
            seed = stream.step_seed(SEED, 0, t)
            row.perturb(seed, EPS)
            plus = case.loss(case.padded)
            row.flip(seed, EPS)
            row.update(seed, EPS, _LR * float((plus - case.loss(case.padded)) / (2 * EPS)))
            if not isinstance(row, MeZO):  # it would only move the weights back to where other rows hold them
                row.end_step()
        row.end_step()

    return Steps(take)


def first_order_steps(case: Case) -> Steps:
    """Steps of AdamW on all weights, with gradients by backpropagation."""
    parameters = list(case.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_LR, fused=parameters[0].is_cuda)

    def take(number: int) -> None:
        for _ in range(number):
            case.loss(case.padded).backward()
            optimizer.step()
            optimizer.zero_grad()

    return Steps(take)


def rows(case: Case) -> Iterator[tuple[str, Callable[[], Steps]]]:
    """The rows by name, each with what builds it."""
    yield "meerkat, captured", functools.partial(engine_steps, case, "auto")
    yield "meerkat, eager", functools.partial(engine_steps, case, "off")
    for name in _ZEROTH_ORDER:
        yield name, lambda name=name: zeroth_order_steps(case, _checked(case, name))  # type: ignore[misc]
    yield "first-order, AdamW", functools.partial(first_order_steps, case)


def _checked(case: Case, name: str) -> Row:
    """Builds a row; before that, builds it once for its check, which changes its state."""
    if case.check:
        elements = sum(p.numel() for p in case.model.parameters())
        check(Entry(name=name, density=1.0, elements=elements, row=DENSE[name](case.model)), case.model)
    return DENSE[name](case.model)


def time_steps(steps: Steps, device: torch.device, number: int, repeats: int) -> dict[str, Any]:
    """Times steps, after as many that compile and fill caches.

    Args:
        steps: takes the steps.
        device: device of the model.
        number: steps at a time, at least 3: a graph is recorded in the second, and compared in the third.
        repeats: how often.

    Returns:
        Under "seconds" the median time of a step until the device is done, under "host" until the host has started it,
        and under "all_seconds" that of each repetition; and what the row says.
    """
    steps.take(number)
    whole, host = [], []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        steps.take(number)
        host.append((time.perf_counter() - start) / number)
        _wait(device)
        whole.append((time.perf_counter() - start) / number)
    return {"seconds": statistics.median(whole), "host": statistics.median(host), "all_seconds": whole, **steps.said()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_row(case: Case, build: Callable[[], Steps], device: torch.device, number: int, repeats: int) -> Any:
    """Times a row, checks that this engine's log gives the weights again, and puts the weights back.

    Returns:
        The record, ready for JSON. That of a row which failed has the reason and no numbers.
    """
    gc.collect()  # what the row before has left
    if device.type == "cuda":
        torch.cuda.empty_cache()
    before = [p.detach().clone() for p in case.model.parameters()]
    try:
        steps = build()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        record = time_steps(steps, device, number, repeats)
        if device.type == "cuda":
            copy = sum(p.numel() * p.element_size() for p in before)  # of the weights, which is not the row's
            record["peak_bytes"] = torch.cuda.max_memory_allocated(device) - copy
        log = record.pop("log", None)
        if log is not None:
            after = [p.detach().clone() for p in case.model.parameters()]
            _put_back(case.model, before)
            replay(case.model, case.mask, log)
            if not all(
                torch.equal(bits_of(p), bits_of(a)) for p, a in zip(case.model.parameters(), after, strict=True)
            ):
                return {"failed": "the replay of its log gives other weights"}
        return record
    except Exception as error:  # such as too little memory: the other rows go on
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        _put_back(case.model, before)


def _put_back(model: nn.Module, values: list[Tensor]) -> None:
    for p, value in zip(model.parameters(), values, strict=True):
        p.data.copy_(value)
        p.grad = None


def measure_plan(
    device: torch.device,
    record: Record,
    models: dict[str, torch.dtype],
    lengths: dict[str, tuple[int, ...]],
    rows: Callable[[Case], Iterator[tuple[str, Callable[[], Steps]]]],
) -> None:
    """Measures rows on models and batches.

    Args:
        device: the device.
        record: receives "rows".
        models: names of shapes, with the dtype of the weights.
        lengths: lengths of the examples of a batch, by name.
        rows: the rows of a case by name, each with what builds it.

    Raises:
        SystemExit: after all of them, if a row has no numbers.
    """
    number, repeats = (10, 3) if device.type == "cuda" else (3, 1)
    failed = []
    for name, dtype in models.items():
        model = shapes.build(name, dtype, device)
        mask = SparseMask.random(model, _DENSITY if device.type == "cuda" else 1e-2, SEED)
        for length_name, of_batch in lengths.items():
            check_rows = length_name == next(iter(lengths))
            case = Case.make(length_name, model, mask, of_batch, check=check_rows)
            for row, build in rows(case):
                found = measure_row(case, build, device, number, repeats)
                place = {"model": name, "batch": len(of_batch), "lengths": length_name, "row": row}
                record.append("rows", {**place, "dtype": str(dtype).removeprefix("torch."), **found})
                failed += [f"{name}, {length_name}, {row}"] if "failed" in found else []
        del model, case
    if failed:
        raise SystemExit(f"no numbers for: {'; '.join(failed)}")


def measure(device: torch.device, record: Record) -> None:
    """Times whole steps, batch 16, at the lengths of SST-2 and at 64 and 256 tokens, with the peak of the memory."""
    if device.type == "cuda":
        models = dict.fromkeys(("opt-1.3b", "smollm2-135m", "llama-3.2-1b"), torch.bfloat16)
        lengths: dict[str, tuple[int, ...]] = {"SST-2": shapes.SST2_LENGTHS, "64": (64,) * 16, "256": (256,) * 16}
    else:
        models = {"embedded": torch.float32}
        lengths = {"SST-2": shapes.SST2_LENGTHS[:4]}
    measure_plan(device, record, models, lengths, rows)


if __name__ == "__main__":
    part(measure)()
