"""Warnings about steps that run but do not do what their user expects. Each comes once for an optimizer."""

import sys
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .caller_warnings import warn_caller
from .estimator import warn_low_precision

# Number of queries in a row with equal losses at both points, after which it is no coincidence.
_EQUAL_QUERIES = 8


class StepWarnings:
    """Warns once of each kind.

    Args:
        model: the model that the steps change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given: set[str] = set()
        self._equal = 0

    def low_precision(self, dtype: torch.dtype) -> None:
        """Warns of a loss in bfloat16 or float16."""
        if self._first("low precision"):
            warn_low_precision(dtype)

    def mode(self) -> None:
        """Warns of modules that make the loss differ from call to call: dropout and batch statistics in training mode.

        Looks at the modules only while the model is in training mode.
        """
        if not self._model.training or "mode" in self._given:
            return
        for name, module in self._model.named_modules():
            if not module.training:
                continue
            if isinstance(module, _DropoutNd) and module.p > 0:
                reason = "drops other units in every call of the closure"
            elif isinstance(module, _BatchNorm) and module.track_running_stats:
                reason = "changes its running statistics in every call of the closure, which no log and no mask covers"
            else:
                continue
            self._given.add("mode")
            warn_caller(
                f"the model is in training mode, and its module {name!r} ({type(module).__name__}) {reason}; call "
                f"model.eval() before the steps"
            )
            return

    def compiler(self) -> None:
        """Warns of a compiler setting that makes weights constants."""
        config = sys.modules.get("torch._inductor.config")
        if config is not None and getattr(config, "freezing", False) and self._first("compiler"):
            warn_caller(
                "torch._inductor.config.freezing is on: models compiled in inference mode keep copies of their "
                "weights, which no step changes; turn it off before compiling"
            )

    def gradients(self, values: Iterable[float]) -> None:
        """Warns if the losses of many queries in a row were equal at both points.

        Args:
            values: the next projected gradients; 0 where the losses were equal.
        """
        for g in values:
            self._equal = self._equal + 1 if g == 0 else 0
            if self._equal >= _EQUAL_QUERIES and self._first("equal"):
                warn_caller(
                    f"the last {self._equal} queries had equal losses at both points, so no step changed anything: the "
                    f"perturbation does not reach the loss. The closure may use another copy of the model (compiled "
                    f"ahead of time, wrapped, sharded, cached or on another device), a part without masked elements "
                    f"(disabled or merged adapters), or a constant; or eps is too small for the weights' dtype (see "
                    f"`unchanged_fraction`)"
                )

    def _first(self, kind: str) -> bool:
        """Whether a kind of warning comes for the first time."""
        first = kind not in self._given
        self._given.add(kind)
        return first


__all__ = ["StepWarnings"]
