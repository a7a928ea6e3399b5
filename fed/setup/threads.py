"""``choose_threads``: one thread for a model that is too small for several."""

import os
from pathlib import Path

import torch

from ...engine.lm import embedded

# Below this size one model was measured: two threads save 16% of a forward on an idle machine, and cost 35% on a busy
# one, where they wait for each other. docs/benchmarks.md has the measurements.
_SMALL = 2**20  # bytes of weights
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def choose_threads(source: str) -> None:
    """Makes torch use one thread if the model is small, unless the environment sets the number of threads.

    For commands, which call it before they load the model. It depends on the size of the model's files alone, so that
    all processes of a run choose the same.

    Args:
        source: value of ``--model``. A model that is not on this machine's disk under that name counts as large.
    """
    if _weights_size(source) <= _SMALL and not any(os.environ.get(name) for name in _VARIABLES):
        torch.set_num_threads(1)


def _weights_size(source: str) -> float:
    """Size of a model's weights in bytes; infinite if they are not found."""
    path = embedded.DIRECTORY if source == embedded.NAME else Path(source)
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else float("inf")


__all__ = ["choose_threads"]
