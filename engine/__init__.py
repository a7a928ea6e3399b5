"""Sparse zeroth-order fine-tuning of language models, alone or federated, replayable to the bit.

Implements Meerkat (arXiv 2506.03337): a static mask of the most sensitive parameters, two-point zeroth-order steps on
those alone, and federation by exchanging the steps' scalars.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import stream
    from .errors import MeerkatError
    from .mask import SparseMask
    from .optimizer import SparseZO
    from .trajectory import replay

__version__ = "0.1.0"

__all__ = ["MeerkatError", "SparseMask", "SparseZO", "__version__", "replay", "stream"]


def __getattr__(name: str) -> Any:
    """A public name, when it is first asked for: a process that only forwards messages need not load torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "stream":  # the engine's own modules ask for it while they are imported
        from .stream import __name__ as submodule

        return sys.modules[submodule]
    from .errors import MeerkatError
    from .mask import SparseMask
    from .optimizer import SparseZO
    from .trajectory import replay

    globals().update(MeerkatError=MeerkatError, SparseMask=SparseMask, SparseZO=SparseZO, replay=replay)
    return globals()[name]
