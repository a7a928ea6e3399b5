"""Hand-written Triton kernels on the masked elements of a model. Each has a plain-torch twin in ``reference``.

The kernels' modules import triton; the engine imports them when the Triton backend is first used. This module, the
reference and the element table need only torch.
"""

from . import correction_reference, reference
from .elements import ALIGN, BLOCK, ElementTable, Layout, build_table, can_be_dense

__all__ = [
    "ALIGN",
    "BLOCK",
    "ElementTable",
    "Layout",
    "build_table",
    "can_be_dense",
    "correction_reference",
    "reference",
]
