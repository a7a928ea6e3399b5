"""Sparse zeroth-order fine-tuning of language models, alone or federated, replayable to the bit.

Implements Meerkat (arXiv 2506.03337): a static mask of the most sensitive parameters, two-point zeroth-order steps on
those alone, and federation by exchanging the steps' scalars. ``meerkat_engine.fed`` has the federation.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import stream as stream
    from .engine.delta import Delta as Delta
    from .engine.errors import MeerkatError as MeerkatError
    from .engine.estimator import Estimator as Estimator
    from .engine.lm.checkpoint import save_checkpoint as save_checkpoint
    from .engine.lm.models import LanguageModel as LanguageModel
    from .engine.lm.models import load_model as load_model
    from .engine.mask import SparseMask as SparseMask
    from .engine.optimizer import SparseZO as SparseZO
    from .engine.parameters import fingerprint as fingerprint
    from .engine.replay import replay as replay
    from .engine.trainer import SparseZOTrainer as SparseZOTrainer
    from .engine.updates import read_updates as read_updates
    from .engine.updates import write_updates as write_updates

__version__ = "0.1.0"

# Where each public name is. It is imported when it is first asked for, so that a process which only forwards messages
# loads no torch, and because tools that take this folder for a package of another name import this file too.
_MODULES = {
    "Delta": "engine.delta",
    "Estimator": "engine.estimator",
    "LanguageModel": "engine.lm.models",
    "MeerkatError": "engine.errors",
    "SparseMask": "engine.mask",
    "SparseZO": "engine.optimizer",
    "SparseZOTrainer": "engine.trainer",
    "fingerprint": "engine.parameters",
    "load_model": "engine.lm.models",
    "read_updates": "engine.updates",
    "replay": "engine.replay",
    "save_checkpoint": "engine.lm.checkpoint",
    "stream": "engine.stream",
    "write_updates": "engine.updates",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_MODULES[name]}", __name__)
    globals()[name] = module if name == "stream" else getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
