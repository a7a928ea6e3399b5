"""Whole steps of this engine with a forward pass by ``torch.compile``, which also fuses, and takes time to compile."""

import functools
from collections.abc import Callable, Iterator

import torch

from .. import shapes
from .part import Record, part
from .steps import Case, Steps, engine_steps, measure_plan


def rows(case: Case) -> Iterator[tuple[str, Callable[[], Steps]]]:
    """The row; its losses may have other last bits than those of the model as it is."""
    loss = torch.compile(case.loss, dynamic=False)
    yield "meerkat, captured, torch.compile", functools.partial(engine_steps, case, "auto", loss)


def measure(device: torch.device, record: Record) -> None:
    """Times whole steps with a compiled forward pass, batch 16, at the lengths of SST-2."""
    models = {"embedded": torch.float32}
    if device.type == "cuda":
        models = dict.fromkeys(("smollm2-135m", "opt-1.3b"), torch.bfloat16)
    measure_plan(device, record, models, {"SST-2": shapes.SST2_LENGTHS}, rows)


if __name__ == "__main__":
    part(measure)()
