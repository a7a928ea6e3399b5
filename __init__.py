"""Sparse zeroth-order fine-tuning of language models, alone or federated, replayable to the bit.

Implements Meerkat (arXiv 2506.03337): a static mask selects the most sensitive weights, two-point zeroth-order steps
train only these, and a federation exchanges the steps' scalars. The federation is in ``meerkat_engine.fed``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import stream as stream
    from .engine.captured import BoundLoss as BoundLoss
    from .engine.delta import Delta as Delta
    from .engine.errors import MeerkatError as MeerkatError
    from .engine.estimator import Estimator as Estimator
    from .engine.lm.checkpoint import save_checkpoint as save_checkpoint
    from .engine.lm.models import LanguageModel as LanguageModel
    from .engine.lm.models import load_model as load_model
    from .engine.lm.quantize import Quantize as Quantize
    from .engine.mask import SparseMask as SparseMask
    from .engine.optimizer import SparseZO as SparseZO
    from .engine.parameters import fingerprint as fingerprint
    from .engine.replay import replay as replay
    from .engine.trainer import SparseZOTrainer as SparseZOTrainer
    from .engine.updates import UpdateLog as UpdateLog

__version__ = "0.1.0"

# Public name -> module that defines it. The module is imported on first access, for two reasons: a process that only
# forwards messages does not load torch, and tools that treat this folder as a package of another name import this file.
_MODULES = {
    "BoundLoss": "engine.captured",
    "Delta": "engine.delta",
    "Estimator": "engine.estimator",
    "LanguageModel": "engine.lm.models",
    "MeerkatError": "engine.errors",
    "Quantize": "engine.lm.quantize",
    "SparseMask": "engine.mask",
    "SparseZO": "engine.optimizer",
    "SparseZOTrainer": "engine.trainer",
    "UpdateLog": "engine.updates",
    "fingerprint": "engine.parameters",
    "load_model": "engine.lm.models",
    "replay": "engine.replay",
    "save_checkpoint": "engine.lm.checkpoint",
    "stream": "engine.stream",
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
