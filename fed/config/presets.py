"""Presets: settings that replace the defaults for some methods and for the embedded model."""

from collections.abc import Mapping
from typing import Any

from ...engine.lm import embedded
from ..methods import Method
from ..partition import Partition

_METHOD_PRESETS: dict[Method, dict[str, Any]] = {
    Method.DECOMFL: {"queries": 5},
    Method.MEERKAT_FZOO: {"queries": 8},
}

# For a run without --model and --task: tuned to the size of the embedded model.
_EMBEDDED_PRESET = {
    "partition": Partition.DIRICHLET,
    "rounds": 30,
    "local_steps": 5,
    "lr": 1e-2,
    "density": 1e-2,
    "calibration_texts": 256,
    "calibration_batch_size": 16,
    "calibration_length": 128,
    "eval_every": 5,
}
# Learning rates, tuned on the held-out examples of the embedded task.
_EMBEDDED_METHOD_PRESETS: dict[Method, dict[str, Any]] = {
    Method.FULL_FEDZO: {"lr": 1e-3},
    Method.DECOMFL: {"lr": 3e-3},
    Method.MEERKAT_FZOO: {"lr": 5e-2},
    Method.WEIGHT_MAGNITUDE: {"lr": 1e-1},
    Method.RANDOM_MASK: {"lr": 1e-1},
    Method.FEDAVG: {"lr": 1e-1},
}


def preset(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset of a run. It overrides the defaults; the user's settings override it.

    Args:
        method: the run's method.
        given: the user's settings by flat names. Only those of model and data are read.

    Returns:
        Values by flat names.
    """
    of_method = dict(_METHOD_PRESETS.get(method, {}))
    if given.get("model", embedded.NAME) == embedded.NAME and given.get("task", embedded.NAME) in embedded.TASKS:
        of_embedded = _EMBEDDED_PRESET | _EMBEDDED_METHOD_PRESETS.get(method, {}) | of_method
        if given.keys() & {"data", "dataset"} and not given.keys() & {"labels", "label_field"}:
            of_embedded["partition"] = Partition.IID  # free text without classes
        return of_embedded
    return of_method


__all__ = ["preset"]
