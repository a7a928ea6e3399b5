"""One pass of every operation over few elements, for tools that watch each access to memory."""

import torch

from ...engine.backend import resolve
from .part import Record, part
from .sweep import Operands


def measure(device: torch.device, record: Record) -> None:
    """Runs every operation once, sparse and dense: for compute-sanitizer."""
    for density in (0.1, 1.0):
        operands = Operands.make([1500, 12, 2052], density, 2, device)
        backend = resolve("triton", device)
        for name, action in operands.actions(backend).items():
            operands.result(action)
            record.append("done", f"{name}, density {density:g}")
        backend.restore_(operands.table, operands.master)
        backend.compare(operands.table, operands.master, torch.zeros(2, dtype=torch.int64, device=device))


if __name__ == "__main__":
    part(measure)()
