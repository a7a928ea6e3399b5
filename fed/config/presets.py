"""What some runs use where nothing else is said: a method's own settings, and those tuned to the embedded model."""

from collections.abc import Mapping
from typing import Any

from ...engine.lm import embedded
from ..methods import Method
from ..partition import Partition

_OF_METHOD: dict[Method, dict[str, Any]] = {Method.DECOMFL: {"queries": 5}}

# Of a run without --model and --task: tuned to the embedded model's size.
_EMBEDDED = {
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
# The learning rates were tuned on the embedded model's held-out examples.
_EMBEDDED_OF_METHOD: dict[Method, dict[str, Any]] = {
    Method.FULL_FEDZO: {"lr": 1e-3},
    Method.DECOMFL: {"lr": 3e-3},
    Method.WEIGHT_MAGNITUDE: {"lr": 1e-1},
    Method.RANDOM_MASK: {"lr": 1e-1},
    Method.FEDAVG: {"lr": 1e-1},
}


def preset(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by flat names that go before the defaults, and behind all that is given.

    Args:
        method: of the run.
        given: what the user says; whether model and task are the embedded ones is what counts.
    """
    found = dict(_OF_METHOD.get(method, {}))
    if given.get("model", embedded.NAME) == embedded.NAME and given.get("task", embedded.NAME) in embedded.TASKS:
        return _EMBEDDED | _EMBEDDED_OF_METHOD.get(method, {}) | found
    return found


__all__ = ["preset"]
