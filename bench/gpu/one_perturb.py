"""One perturbation of a model's shape, for a profiler that counts the bytes it moves."""

import torch

from ...engine.backend import resolve
from ..rows import table_bytes_moved
from ..shapes import parameter_sizes
from .part import Record, part
from .sweep import Operands


def measure(device: torch.device, record: Record) -> None:
    """Perturbs Llama-3.2-1B's shape at density 0.001 twice; for ncu, which counts what the second moves."""
    operands = Operands.make(parameter_sizes("llama-3.2-1b" if device.type == "cuda" else "embedded"), 1e-3, 2, device)
    action = operands.actions(resolve("triton", device))["perturb"]
    operands.result(action)
    operands.result(action)
    record["must_move_bytes"] = table_bytes_moved(operands.table)


if __name__ == "__main__":
    part(measure)()
