"""What a step costs beside its two forward passes: ``python -m meerkat_engine.bench.step --model FILE.gguf``.

Rows, each checked before it is timed, then timed in turn within every repetition, so that a noisy machine slows all:

    forwards          the two forward passes alone: what no zeroth-order step can do without
    meerkat           this engine
    sparse-indexing   the same elements by torch indexing, with torch's own generator; restored by arithmetic
    mezo              every element, as MeZO's loop is described (arXiv 2305.17333, algorithm 1): a normal tensor per
                      parameter, out of place, drawn anew for +eps, -2 eps, +eps and the update
"""

import functools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import SparseMask, SparseZO, embedded, stream
from ..models import load_model

Closure = Callable[[], Tensor]
LR, EPS, SEED = 1e-6, 1e-3, 17


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    Args:
        median: of the step's time over that of two forwards in the same repetition.
        p20: 20th percentile of the same.
        p80: 80th percentile of the same.
        inside: median of the step's time over the time within its own two forwards.
        peak_bytes: most memory the step holds beyond its forwards and what was there before.
    """

    median: float
    p20: float
    p80: float
    inside: float
    peak_bytes: int


def mezo_step(model: nn.Module, closure: Closure, seed: int) -> float:
    """A step over all elements as MeZO describes it; returns the projected gradient."""

    def add(scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            z = torch.normal(0.0, 1.0, size=p.shape, generator=generator, dtype=p.dtype)
            p.data = p.data + scale * z

    return _two_point(add, closure)


def indexing_step(places: list[tuple[Tensor, Tensor]], closure: Closure, seed: int) -> float:
    """A step over some elements of flat weights by torch indexing; returns the projected gradient."""

    def add(scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for flat, offsets in places:
            z = torch.normal(0.0, 1.0, size=offsets.shape, generator=generator)
            flat[offsets] += scale * z

    return _two_point(add, closure)


def _two_point(add: Callable[[float], None], closure: Closure) -> float:
    """A step that restores by arithmetic: ``add(s)`` adds ``s * z`` to the weights."""
    add(EPS)
    plus = closure().item()
    add(-2 * EPS)
    minus = closure().item()
    add(EPS)
    g = (plus - minus) / (2 * EPS)
    add(-LR * g)
    return g


def places_of(model: nn.Module, mask: SparseMask) -> list[tuple[Tensor, Tensor]]:
    """Flat weights and offsets of the masked elements of each parameter that has any."""
    bounds = torch.searchsorted(mask.ids, torch.tensor([*mask.table.bases, mask.table.size])).tolist()
    found = []
    for p, base, start, stop in zip(model.parameters(), mask.table.bases, bounds, bounds[1:], strict=False):
        if stop > start:
            found.append((p.detach().view(-1), mask.ids[start:stop] - base))
    return found


def check_rows(model: nn.Module, mask: SparseMask, opt: SparseZO, closure: Closure) -> None:
    """Raises ``RuntimeError`` unless every row computes its update.

    This engine's bits are compared exactly; the two that restore by arithmetic, within what that loses.
    """
    before = torch.cat([p.detach().view(-1).clone() for p in model.parameters()])
    opt.step(closure, SEED)
    c = torch.tensor(LR * opt.projected_gradients[-1], dtype=torch.float32)
    wanted = before.clone()
    wanted[mask.ids] -= stream.normal(SEED, mask.ids) * c
    after = torch.cat([p.detach().view(-1) for p in model.parameters()])
    _require(torch.equal(after, wanted), "meerkat")
    opt.weights.set_masters_(before[mask.ids])

    places = places_of(model, mask)
    g = indexing_step(places, closure, SEED)
    generator = torch.Generator().manual_seed(SEED)
    z = torch.cat([torch.normal(0.0, 1.0, size=offsets.shape, generator=generator) for _, offsets in places])
    after = torch.cat([p.detach().view(-1) for p in model.parameters()])
    wanted = before.clone()
    wanted[mask.ids] -= LR * g * z
    _require(torch.allclose(after, wanted, rtol=0, atol=1e-6), "sparse-indexing")
    opt.weights.restore_()


def check_mezo(model: nn.Module, closure: Closure) -> None:
    """Raises ``RuntimeError`` unless the dense row computes its update; leaves the weights as they were."""
    before = [p.detach().clone() for p in model.parameters()]
    g = mezo_step(model, closure, SEED)
    generator = torch.Generator().manual_seed(SEED)
    for p, old in zip(model.parameters(), before, strict=True):
        z = torch.normal(0.0, 1.0, size=p.shape, generator=generator, dtype=p.dtype)
        _require(torch.allclose(p, old - LR * g * z, rtol=0, atol=1e-6), "mezo")
        p.data = old


def _require(holds: bool, row: str) -> None:
    if not holds:
        raise RuntimeError(f"row {row!r} does not compute its update; nothing was timed")


def peak_bytes(action: Callable[[], object]) -> int:
    """Most memory that an action holds at a time beyond what was there before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def measure(rows: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each row in each repetition, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for repetition in range(repeats + 1):
        for name, action in rows.items():
            begun = time.perf_counter()
            action()
            if repetition:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Each row over the forwards of the same repetition: median, p20, p80."""
    found = {}
    for name, values in seconds.items():
        over = [value / base for value, base in zip(values, seconds["forwards"], strict=True)]
        cuts = statistics.quantiles(over, n=5, method="inclusive")
        found[name] = {"median": statistics.median(over), "p20": cuts[0], "p80": cuts[3]}
    return found


@dataclass
class Timed:
    """A closure that adds up the time it takes."""

    closure: Closure
    seconds: float = 0.0

    def __call__(self) -> Tensor:
        """The closure's loss."""
        begun = time.perf_counter()
        loss = self.closure()
        self.seconds += time.perf_counter() - begun
        return loss


def inside(step: Callable[[Closure, int], object], closure: Closure, seeds: Iterator[int], repeats: int) -> float:
    """Median over some steps of the step's time over the time within its own two forwards."""
    found = []
    for _ in range(repeats):
        timed = Timed(closure)
        begun = time.perf_counter()
        step(timed, next(seeds))
        found.append((time.perf_counter() - begun) / timed.seconds)
    return statistics.median(found)


def closure_of(net: nn.Module, batch_size: int, length: int) -> Closure:
    """Loss of a batch of random tokens, at the last position."""
    vocabulary: int = net.config.vocab_size  # type: ignore[union-attr, assignment]
    words = stream.bits(SEED, torch.arange(batch_size * length))[:, 0] % vocabulary
    ids = words.view(batch_size, length)

    @torch.inference_mode()
    def closure() -> Tensor:
        logits = net(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1]
        return functional.cross_entropy(logits, ids[:, 0])

    return closure


def compare(net: nn.Module, mask: SparseMask, closure: Closure, repeats: int) -> dict[str, Row]:
    """Checks every row, then measures it."""
    opt = SparseZO(net, mask, lr=LR, eps=EPS)
    check_rows(net, mask, opt, closure)
    places, seeds = places_of(net, mask), iter(range(10**9))
    steps: dict[str, Callable[[Closure, int], object]] = {
        "meerkat": opt.step,
        "sparse-indexing": lambda closure, seed: indexing_step(places, closure, seed),
        "mezo": lambda closure, seed: mezo_step(net, closure, seed),
    }

    def forwards() -> None:
        closure().item()
        closure().item()

    def rows_of(*names: str, repeats: int) -> dict[str, Row]:
        actions = {name: functools.partial(lambda step: step(closure, next(seeds)), steps[name]) for name in names}
        over = ratios(measure({"forwards": forwards, **actions}, repeats))
        return {
            name: Row(
                **over[name],
                inside=inside(steps[name], closure, seeds, repeats),
                peak_bytes=peak_bytes(lambda: steps[name](lambda: torch.zeros(()), next(seeds))),  # noqa: B023
            )
            for name in names
        }

    found = rows_of("meerkat", "sparse-indexing", repeats=repeats)
    # MeZO's loop gives the weights new memory, which this engine's optimizer would refuse: it goes last.
    check_mezo(net, closure)
    return found | rows_of("mezo", repeats=max(3, repeats // 3))


@click.command()
@click.option("--model", default=embedded.NAME, show_default=True, help="Hugging Face id, directory or GGUF file")
@click.option("--density", default=1e-3, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--length", default=24, show_default=True, help="tokens of a sequence")
@click.option("--repeats", default=15, show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="also write the result here")
def main(model: str, density: float, batch_size: int, length: int, repeats: int, path: Path | None) -> None:
    """Times a step beside its forwards, and beside MeZO's loop, in one process."""
    net = (embedded.load() if model == embedded.NAME else load_model(model)).model
    mask = SparseMask.random(net, density, SEED)
    rows = compare(net, mask, closure_of(net, batch_size, length), repeats)
    click.echo(f"{mask.table.size:,} elements, {len(mask):,} masked, batch {batch_size} x {length} tokens")
    click.echo(f"{'':<16} {'step over two forwards':^28} {'over its own':>13} {'extra memory':>13}")
    click.echo(f"{'row':<16} {'median':>10} {'p20':>8} {'p80':>8} {'forwards':>13} {'at peak':>13}")
    for name, row in rows.items():
        click.echo(
            f"{name:<16} {row.median:>10.3f} {row.p20:>8.3f} {row.p80:>8.3f} {row.inside:>13.3f} "
            f"{row.peak_bytes / 1e6:>10,.2f} MB"
        )
    if path is not None:
        record = {
            "what": "seconds of a step over seconds of two forwards (same repetition; inside: its own two)",
            "model": Path(model).name,
            "elements": mask.table.size,
            "masked": len(mask),
            "batch": [batch_size, length],
            "repeats": repeats,
            "rows": {name: asdict(row) for name, row in rows.items()},
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
            "torch": torch.__version__,
            "commit": _commit(),
        }
        path.write_text(json.dumps(record, indent=1) + "\n")


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
