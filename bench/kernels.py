"""Checks and times every row of ``rows`` on the weights of one model.

Each repetition times all rows in turn, so that noise of the machine affects all rows alike. Ratios are computed within
a repetition. A slow row is timed in the first three repetitions only.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..engine.errors import MeerkatError
from ..engine.mask import SparseMask
from .measure import Moments, Spread, Stopwatch, peak_bytes
from .rows import DENSE, OPERATIONS, SPARSE, SPARSE_ONCE, PlainTorch, Row

EPS, C, SEED = 1e-3, 1e-6, 17
_SLOW, _REPEATS_OF_SLOW = 0.5, 3  # a row is slow if its three operations take more than _SLOW seconds
# Large compared with the weights, and different: a wrong sign or factor is then far outside rounding errors.
_CHECK_EPS, _CHECK_C = 0.25, 0.375


class CheckError(MeerkatError, RuntimeError):
    """A measured operation computes a wrong result; its times are not reported."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row bound to one model.

    Args:
        name: the row's name.
        density: density of the row's mask; 1.0 for dense rows.
        elements: number of elements that the row moves.
        row: the row.
    """

    name: str
    density: float
    elements: int
    row: Row


def entry_factories(model: nn.Module, densities: list[float], base_density: float) -> list[Callable[[], Entry]]:
    """Returns a factory for every row of a model.

    A factory builds its row from the weights that the model has when the factory is called.

    Args:
        model: the model.
        densities: densities of the masks of the rows in ``SPARSE``.
        base_density: density of the mask of the rows in ``SPARSE_ONCE``.
    """
    params = list(model.parameters())
    d, on_cpu = sum(p.numel() for p in params), params[0].device.type == "cpu"

    @functools.cache
    def mask_of(density: float) -> SparseMask:
        return SparseMask.random(model, density, SEED)

    def sparse(name: str, density: float, build: Callable[[nn.Module, SparseMask], Row]) -> Entry:
        mask = mask_of(density)
        return Entry(name=name, density=density, elements=len(mask), row=build(model, mask))

    def dense(name: str, build: Callable[[nn.Module], Row]) -> Entry:
        return Entry(name=name, density=1.0, elements=d, row=build(model))

    once = {name: build for name, build in SPARSE_ONCE.items() if on_cpu or build is not PlainTorch}
    return [
        *(functools.partial(sparse, name, density, SPARSE[name]) for density in densities for name in SPARSE),
        *(functools.partial(sparse, name, base_density, once[name]) for name in once),
        *(functools.partial(dense, name, DENSE[name]) for name in DENSE),
    ]


def check(entry: Entry, model: nn.Module) -> int:
    """Runs each operation once and compares the weights with the operation's formula.

    The weights are then set back. The row's own state (its masters) is not: build the row again before it is timed.

    Args:
        entry: the row to check.
        model: the model that the row was built for.

    Returns:
        Peak memory that an operation allocates, in bytes.

    Raises:
        CheckError: if an operation leaves wrong weights, or the noise is not standard normal.
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
                if not _is_moved_by(p.detach().view(-1), old, z.to(device), scale, exact=row.exact):
                    raise CheckError(
                        f"row {entry.name!r} at density {entry.density:g}: {operation} leaves weights that differ from "
                        "its formula"
                    )
    finally:
        row.end_step()
        for p, old in zip(params, before, strict=True):
            p.data.copy_(old.view(p.shape))
    return peak


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """Returns the bits of floating-point numbers as integers, so that -0 differs from +0 and NaN equals itself."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _is_moved_by(new: torch.Tensor, old: torch.Tensor, z: torch.Tensor, scale: float, *, exact: bool) -> bool:
    """Whether ``new`` is ``old + scale * z``: to the bit if ``exact``, else within rounding errors."""
    expected = old.float() + z * torch.tensor(scale, dtype=torch.float32, device="cpu")
    if exact:
        return torch.equal(bits_of(new), bits_of(expected.to(new.dtype)))
    # At most four roundings of numbers no larger than the weight plus three perturbations.
    rounding = 4 * torch.finfo(new.dtype).eps * (old.float().abs() + 3 * abs(scale) * z.abs())
    return bool(((new.float() - expected).abs() <= rounding).all())


def _check_moments(entry: Entry, noise: list[torch.Tensor]) -> None:
    """Raises ``CheckError`` if the mean or variance of the noise is off by more than six standard errors."""
    n = max(1, sum(int(z.count_nonzero()) for z in noise))
    total = sum(z.sum(dtype=torch.float64).item() for z in noise)
    squares = sum(z.square().sum(dtype=torch.float64).item() for z in noise)
    if n < 0.99 * entry.elements or abs(total / n) > 6 / n**0.5 or abs(squares / n - 1) > 6 * (2 / n) ** 0.5:
        raise CheckError(
            f"row {entry.name!r} at density {entry.density:g}: noise at {n} of {entry.elements} elements with mean "
            f"{total / n:.3g} and variance {squares / n:.3g} is not standard normal"
        )


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a row's operations, by name: one value per repetition on the device, and by the host to start it."""

    device: dict[str, list[float]]
    host: dict[str, list[float]]

    @classmethod
    def empty(cls) -> "Times":
        """Returns times of no repetition."""
        return cls(device={operation: [] for operation in OPERATIONS}, host={operation: [] for operation in OPERATIONS})

    def take(self, watch: Stopwatch, moments: dict[str, Moments]) -> float:
        """Adds a repetition; returns the device's seconds of all operations."""
        elapsed = {operation: watch.seconds(moment) for operation, moment in moments.items()}
        for operation, moment in moments.items():
            self.device[operation].append(elapsed[operation])
            self.host[operation].append(moment.host)
        return sum(elapsed.values())


def time_rows(rows: list[Row], device: torch.device, repeats: int) -> list[Times]:
    """Times the operations of all rows. The rows must be warmed up (their checks do that).

    Args:
        rows: the rows.
        device: device of the weights.
        repeats: number of repetitions.

    Returns:
        The times of each row.
    """
    watch = Stopwatch(device)
    times = [Times.empty() for _ in rows]
    slow = [False] * len(rows)
    for repetition in range(repeats):
        for i, row in enumerate(rows):
            if slow[i] and repetition >= _REPEATS_OF_SLOW:
                continue
            seed = SEED + repetition
            row.prepare(seed, EPS, C)
            moments = {
                "perturb": watch.cold(functools.partial(row.perturb, seed, EPS)),
                "flip": watch.cold(functools.partial(row.flip, seed, EPS)),
                "update": watch.cold(functools.partial(row.update, seed, EPS, C)),
            }
            slow[i] |= times[i].take(watch, moments) > _SLOW
            row.end_step()
    return times


def measure_rows(model: nn.Module, densities: list[float], repeats: int, base_density: float) -> list[dict[str, Any]]:
    """Checks and times every row of a model.

    Args:
        model: the model; a few small updates change its weights.
        densities: densities of the masks.
        repeats: number of repetitions, at least 3.
        base_density: one of ``densities``; ratios are relative to this engine's row at this density.

    Returns:
        One record per row, ready for JSON. The record of a row whose check failed has the reason and no numbers.
    """
    device = next(model.parameters()).device
    passed: list[tuple[Entry, int]] = []
    failed: list[dict[str, Any]] = []
    for make_entry in entry_factories(model, densities, base_density):
        entry = make_entry()
        try:
            peak = check(entry, model)
        except CheckError as error:
            failed.append({"row": entry.name, "density": entry.density, "failed": str(error)})
            continue
        del entry  # before it is built again: of a dense row's masters two copies may not fit
        passed.append((make_entry(), peak))  # the check changed the first one's state
    times = time_rows([entry.row for entry, _ in passed], device, repeats)
    base: dict[str, list[float]] | None = None
    for (entry, _), row_times in zip(passed, times, strict=True):
        if base is None and entry.name == "meerkat" and entry.density == base_density:
            base = row_times.device
    measured = zip(passed, times, strict=True)
    return [_record(entry, peak, row_times, base) for (entry, peak), row_times in measured] + failed


def _record(entry: Entry, peak: int, times: Times, base: dict[str, list[float]] | None) -> dict[str, Any]:
    """Returns a row's record, with ratios to the seconds in ``base``, if given."""
    seconds = times.device
    steps = _sums(seconds)
    record: dict[str, Any] = {
        "row": entry.name,
        "density": entry.density,
        "elements": entry.elements,
        "normals": entry.row.normals_drawn,
        "bytes": entry.row.bytes_moved,
        "held_bytes": entry.row.bytes_held,
        "peak_bytes": peak,
        "seconds": {name: asdict(Spread.of(values)) for name, values in {**seconds, "step": steps}.items()},
        "host_seconds": {name: asdict(Spread.of(values)) for name, values in times.host.items()},
    }
    if base is not None:
        ratios = {
            name: [time / base_time for time, base_time in zip(values, base_values, strict=False)]
            for name, values, base_values in (
                ("perturb", seconds["perturb"], base["perturb"]),
                ("step", steps, _sums(base)),
            )
        }
        record["ratio"] = {name: asdict(Spread.of(values)) for name, values in ratios.items()}
    return record


def _sums(seconds: dict[str, list[float]]) -> list[float]:
    """Returns the seconds of all operations together, one value per repetition."""
    return [sum(values) for values in zip(*seconds.values(), strict=True)]


__all__ = ["CheckError", "Times", "bits_of", "check", "entry_factories", "measure_rows", "time_rows"]
