"""Sparse zeroth-order fine-tuning of language models, alone or federated, replayable to the bit.

Implements Meerkat (arXiv 2506.03337): a static mask of the most sensitive parameters, two-point zeroth-order steps on
those alone, and federation by exchanging the steps' scalars.
"""

from . import stream
from .errors import MeerkatError
from .mask import SparseMask
from .optimizer import SparseZO
from .trajectory import replay

__version__ = "0.1.0"

__all__ = ["MeerkatError", "SparseMask", "SparseZO", "__version__", "replay", "stream"]
