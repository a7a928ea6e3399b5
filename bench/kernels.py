"""The matrix: every row of ``rows`` on the weights of one model, checked first, then timed in turn.

All rows take their turn in every repetition, so that a noisy machine slows all alike; a ratio is taken within one
repetition. A slow row stays for three repetitions only.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..engine.errors import MeerkatError
from ..engine.mask import SparseMask
from .measure import Spread, Stopwatch, peak_bytes
from .rows import DENSE, OPERATIONS, SPARSE, SPARSE_ONCE, PlainTorch, Row

EPS, C, SEED = 1e-3, 1e-6, 17
_SLOW, _REPEATS_OF_SLOW = 0.5, 3  # seconds of a row's three operations
# Large beside the weights and each other, so that a wrong sign or factor is far outside rounding.
_CHECK_EPS, _CHECK_C = 0.25, 0.375


class CheckError(MeerkatError, RuntimeError):
    """A row does not compute its update; there are no numbers for it."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row on one model.

    Args:
        name: of the row.
        density: of its mask; 1.0 for dense rows.
        elements: that it moves.
    """

    name: str
    density: float
    elements: int
    row: Row


def entries(model: nn.Module, densities: list[float], base_density: float) -> list[Callable[[], Entry]]:
    """Every row of a model; made when called, from the weights as they are then."""
    params = list(model.parameters())
    d, on_cpu = sum(p.numel() for p in params), params[0].device.type == "cpu"

    @functools.cache
    def mask_of(density: float) -> SparseMask:
        return SparseMask.random(model, density, SEED)

    def sparse(name: str, density: float, kind: Callable[[nn.Module, SparseMask], Row]) -> Entry:
        mask = mask_of(density)
        return Entry(name=name, density=density, elements=len(mask), row=kind(model, mask))

    def dense(name: str, kind: Callable[[nn.Module], Row]) -> Entry:
        return Entry(name=name, density=1.0, elements=d, row=kind(model))

    once = {name: kind for name, kind in SPARSE_ONCE.items() if on_cpu or kind is not PlainTorch}
    return [
        *(functools.partial(sparse, name, density, SPARSE[name]) for density in densities for name in SPARSE),
        *(functools.partial(sparse, name, base_density, once[name]) for name in once),
        *(functools.partial(dense, name, DENSE[name]) for name in DENSE),
    ]


def check(entry: Entry, model: nn.Module) -> int:
    """Runs each operation once, compares the weights with their formula, and puts the weights back, not the row.

    Returns:
        Most memory that an operation held, in bytes.

    Raises:
        CheckError: if an operation leaves other weights than it should, or the noise is not standard normal.
    """
    params, row = list(model.parameters()), entry.row
    device = params[0].device
    before, noise = [p.detach().clone().view(-1) for p in params], list(row.noise(SEED))
    calls: dict[str, tuple[Callable[[], None], float]] = {
        "perturb": (lambda: row.perturb(SEED, _CHECK_EPS), _CHECK_EPS),
        "flip": (lambda: row.flip(SEED, _CHECK_EPS), -_CHECK_EPS),
        "update": (lambda: row.update(SEED, _CHECK_EPS, _CHECK_C), -_CHECK_C),
    }
    _check_moments(entry, noise)
    peak = 0
    try:
        for operation, (call, scale) in calls.items():
            peak = max(peak, peak_bytes(call, device))
            for p, old, z in zip(params, before, noise, strict=True):
                if not _moved_by(p.detach().view(-1), old, z.to(device), scale, exact=row.exact):
                    raise CheckError(f"row {entry.name!r} at density {entry.density:g}: {operation} is not its formula")
    finally:
        row.settle()
        for p, old in zip(params, before, strict=True):
            p.data.copy_(old.view(p.shape))
    return peak


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """The bits of some floating-point numbers as integers: -0 differs from +0, NaN equals itself."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _moved_by(new: torch.Tensor, old: torch.Tensor, z: torch.Tensor, scale: float, *, exact: bool) -> bool:
    wanted = old.float() + z * torch.tensor(scale, dtype=torch.float32)
    if exact:
        return torch.equal(bits_of(new), bits_of(wanted.to(new.dtype)))
    # Up to four roundings of numbers as large as the weight and three perturbations.
    rounding = 4 * torch.finfo(new.dtype).eps * (old.float().abs() + 3 * abs(scale) * z.abs())
    return bool(((new.float() - wanted).abs() <= rounding).all())


def _check_moments(entry: Entry, noise: list[torch.Tensor]) -> None:
    """Six standard errors of mean and variance."""
    n = max(1, sum(int(z.count_nonzero()) for z in noise))
    total = sum(z.sum(dtype=torch.float64).item() for z in noise)
    squares = sum(z.square().sum(dtype=torch.float64).item() for z in noise)
    if n < 0.99 * entry.elements or abs(total / n) > 6 / n**0.5 or abs(squares / n - 1) > 6 * (2 / n) ** 0.5:
        raise CheckError(
            f"row {entry.name!r} at density {entry.density:g}: noise at {n} of {entry.elements} elements with mean "
            f"{total / n:.3g} and variance {squares / n:.3g} is not standard normal"
        )


def time_rows(rows: list[Row], device: torch.device, repeats: int) -> list[dict[str, list[float]]]:
    """Seconds of each operation of each row in each repetition; the rows' checks have warmed them up."""
    watch = Stopwatch(device)
    seconds: list[dict[str, list[float]]] = [{operation: [] for operation in OPERATIONS} for _ in rows]
    slow = [False] * len(rows)
    for repetition in range(repeats):
        for i, row in enumerate(rows):
            if slow[i] and repetition >= _REPEATS_OF_SLOW:
                continue
            seed = SEED + repetition
            moments = {
                "perturb": watch.cold(functools.partial(row.perturb, seed, EPS)),
                "flip": watch.cold(functools.partial(row.flip, seed, EPS)),
                "update": watch.cold(functools.partial(row.update, seed, EPS, C)),
            }
            took = {operation: watch.seconds(at) for operation, at in moments.items()}
            row.settle()
            slow[i] |= sum(took.values()) > _SLOW
            for operation in OPERATIONS:
                seconds[i][operation].append(took[operation])
    return seconds


def matrix(model: nn.Module, densities: list[float], repeats: int, base_density: float) -> list[dict[str, Any]]:
    """Checks and times every row of a model.

    Args:
        model: its weights are moved by a few small updates.
        densities: of the masks.
        repeats: at least 3.
        base_density: the density of this engine's row that ratios are taken to; one of ``densities``.

    Returns:
        For each row what was measured; for a row whose check failed, what failed and no number.
    """
    device = next(model.parameters()).device
    passed: list[tuple[Entry, int]] = []
    failed: list[dict[str, Any]] = []
    for make in entries(model, densities, base_density):
        entry = make()
        try:
            peak = check(entry, model)
            passed.append((make(), peak))  # anew: the checked one's own state has moved on
        except CheckError as error:
            failed.append({"row": entry.name, "density": entry.density, "failed": str(error)})
    seconds = time_rows([entry.row for entry, _ in passed], device, repeats)
    base = next(
        (s for (e, _), s in zip(passed, seconds, strict=True) if e.name == "meerkat" and e.density == base_density),
        None,
    )
    return [_record(e, peak, s, base) for (e, peak), s in zip(passed, seconds, strict=True)] + failed


def _record(
    entry: Entry, peak: int, seconds: dict[str, list[float]], base: dict[str, list[float]] | None
) -> dict[str, Any]:
    steps = _sums(seconds)
    record: dict[str, Any] = {
        "row": entry.name,
        "density": entry.density,
        "elements": entry.elements,
        "normals": entry.row.normals,
        "bytes": entry.row.moved,
        "held_bytes": entry.row.held,
        "peak_bytes": peak,
        "seconds": {name: asdict(Spread.of(values)) for name, values in {**seconds, "step": steps}.items()},
    }
    if base is not None:
        ratios = {
            name: [mine / other for mine, other in zip(values, reference, strict=False)]
            for name, values, reference in (
                ("perturb", seconds["perturb"], base["perturb"]),
                ("step", steps, _sums(base)),
            )
        }
        record["ratio"] = {name: asdict(Spread.of(values)) for name, values in ratios.items()}
    return record


def _sums(seconds: dict[str, list[float]]) -> list[float]:
    return [sum(values) for values in zip(*seconds.values(), strict=True)]


__all__ = ["CheckError", "bits_of", "check", "entries", "matrix", "time_rows"]
