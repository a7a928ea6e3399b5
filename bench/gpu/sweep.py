"""Times each kernel at several sizes, densities and launch configurations, each checked against the default's bits.

Every time is a device's: "cold" after a flush of the caches, with the host ahead; "captured" in a CUDA graph of several
launches one after the other, divided by their number.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...engine import stream
from ...engine.backend import Backend, resolve
from ...engine.device_values import DeviceValues
from ...triton_kernels import ElementTable, build_table
from ...triton_kernels.launch import LaunchConfig, forced_config
from ..kernels import bits_of
from ..measure import Stopwatch
from ..shapes import parameter_sizes
from .part import Record, part

_IN_A_GRAPH, _REPEATS = 20, 5
# (elements per program, warps)
_CONFIGS = ((1024, 8), (1024, 4), (512, 4), (512, 2), (256, 2), (256, 1), (128, 1))


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Masked elements, and values for the operations on them.

    Args:
        table: where they are.
        master: their masters, float32 [slots].
        ids: their element ids, int64 [k].
        seeds: int64 [steps].
        c: coefficients, float32 [steps], small.
    """

    table: ElementTable
    master: Tensor
    ids: Tensor
    seeds: Tensor
    c: Tensor

    @classmethod
    def make(cls, sizes: list[int], density: float, steps: int, device: torch.device) -> "Operands":
        """Makes bfloat16 weights of these sizes, and masks a random share of them: all if the density is 1."""
        weights = [torch.zeros(size, dtype=torch.bfloat16, device=device) for size in sizes]
        bases = [0, *itertools.accumulate(sizes)][:-1]
        if density == 1:
            table = build_table(weights, bases, None)
            ids = torch.zeros(0, dtype=torch.int64, device=device)
        else:
            offsets = [_random_offsets(size, density, i, device) for i, size in enumerate(sizes)]
            kept = [i for i, of_tensor in enumerate(offsets) if of_tensor.numel()]
            table = build_table([weights[i] for i in kept], [bases[i] for i in kept], [offsets[i] for i in kept])
            ids = torch.cat([offsets[i] + bases[i] for i in kept]).to(device)
        seeds = DeviceValues(device).seeds([stream.step_seed(1, 0, t) for t in range(steps)])
        return cls(
            table=table,
            master=torch.full((table.slots,), 0.02, dtype=torch.float32, device=device),
            ids=ids,
            seeds=seeds,
            c=torch.full((steps,), 1e-9, dtype=torch.float32, device=device),
        )

    def actions(self, backend: Backend) -> dict[str, Callable[[], Tensor | None]]:
        """The operations; ``inner`` returns its products, the others write weights and masters."""
        table, master, seeds, c = self.table, self.master, self.seeds, self.c
        actions: dict[str, Callable[[], Tensor | None]] = {
            "perturb": lambda: backend.perturb_(table, master, seeds[:1], c[:1]),
            "update + perturb": lambda: backend.update_perturb_(
                table, master, seeds[:1], c[:1], seeds[1:2], c[1:2], applied=None, number=0
            ),
            "replay": lambda: backend.replay_(table, master, seeds, c, applied=None, number=0),
        }
        if self.table.offsets is not None:
            gradient = torch.full((self.ids.numel(),), 0.5, dtype=torch.float32, device=master.device)
            actions["inner"] = lambda: backend.inner(gradient, self.ids, seeds)
        return actions

    def result(self, action: Callable[[], Tensor | None]) -> Tensor:
        """The bits that an operation leaves, from the same masters each time."""
        self.master.fill_(0.02)
        returned = action()
        left = torch.cat([*self.table.weights]) if returned is None else returned
        return bits_of(left)


def _random_offsets(size: int, density: float, seed: int, device: torch.device) -> Tensor:
    """Draws about ``density * size`` offsets in [0, size): ascending, int64, on the CPU."""
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.rand(size, dtype=torch.float32, device=device, generator=generator)
    return (drawn < density).nonzero()[:, 0].cpu()


def _captured(action: Callable[[], object], times: int) -> float:
    """Returns the seconds of an action in a graph that runs it ``times`` times."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            action()
    seconds = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / times)
    return float(statistics.median(seconds))


def time_action(action: Callable[[], object], device: torch.device, watch: Stopwatch, *, long: bool) -> dict[str, Any]:
    """Times an action that was run before.

    Args:
        action: launches kernels only.
        device: their device.
        watch: a stopwatch of the device.
        long: whether it takes more than a few milliseconds; then it is timed less often.

    Returns:
        Medians in seconds: "cold"; on a GPU "captured"; and "host", what the host takes to launch it.
    """
    repeats = 2 if long or device.type != "cuda" else _REPEATS
    moments = [watch.cold(action) for _ in range(repeats)]
    found = {"cold": statistics.median(map(watch.seconds, moments)), "host": statistics.median(m.host for m in moments)}
    if device.type == "cuda":
        found["captured"] = _captured(action, 1 if long else _IN_A_GRAPH)
    return found


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed: a model's shape, the density of the mask, steps of replay and inner, and configurations."""

    model: str
    sizes: list[int]
    density: float
    steps: int
    configs: tuple[tuple[int, int] | None, ...]  # elements per program and warps; None is the default


def cases(device: torch.device) -> Iterator[Case]:
    """The cases for a device: first everything with the default configuration, then the others."""
    if device.type != "cuda":
        for density in (0.1, 1.0):
            yield Case(model="tiny", sizes=[300, 64], density=density, steps=2, configs=(None, (256, 2)))
        return
    models = {model: parameter_sizes(model) for model in ("llama-3.2-1b", "smollm2-135m")}
    for configs, densities in (((None,), (1e-3, 1e-2, 1e-4, 1.0)), (_CONFIGS, (1e-3, 1.0))):
        for model, sizes in models.items():
            for density in densities:
                steps = 4 if density == 1 else 1000
                yield Case(model=model, sizes=sizes, density=density, steps=steps, configs=configs)


def _time_case(case: Case, device: torch.device, watch: Stopwatch, record: Record) -> list[str]:
    """Adds a row for each operation and configuration; returns those whose bits are not the default's."""
    wrong = []
    operands = Operands.make(case.sizes, case.density, case.steps, device)
    for name, action in operands.actions(resolve("triton", device)).items():
        many = name in ("replay", "inner")
        row = {"model": case.model, "density": case.density, "elements": operands.table.nnz, "operation": name,
               "steps": case.steps if many else 1}  # fmt: skip
        wanted = operands.result(action)
        for config in case.configs:
            label = "default" if config is None else f"{config[0]} x {config[1]}"
            force = forced_config(LaunchConfig(block=config[0], num_warps=config[1])) if config else nullcontext()
            with force:
                if torch.equal(operands.result(action), wanted):
                    times = time_action(action, device, watch, long=many or case.density == 1)
                else:
                    times = {"failed": "other bits than the default configuration's"}
                    wrong.append(f"{case.model} {case.density:g} {name} {label}")
            record.append("rows", {**row, "config": label, **times})
    return wrong


def measure(device: torch.device, record: Record) -> None:
    """Times perturb, update + perturb, replay and inner over sizes, densities and launch configurations."""
    watch = Stopwatch(device)
    wrong = [message for case in cases(device) for message in _time_case(case, device, watch, record)]
    if wrong:
        raise SystemExit(f"other bits than the default configuration: {', '.join(wrong)}")


if __name__ == "__main__":
    part(measure)()
