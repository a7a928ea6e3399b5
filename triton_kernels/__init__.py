"""Hand-written Triton kernels on the masked elements of a model, each beside its plain-torch twin in ``reference``.

The kernels' modules import triton and are imported by the engine when the Triton backend is first used; this module,
the reference and the element table need torch alone.
"""

from . import reference
from .elements import ALIGN, BLOCK, ElementTable, build_table, can_be_dense

__all__ = ["ALIGN", "BLOCK", "ElementTable", "build_table", "can_be_dense", "reference"]
