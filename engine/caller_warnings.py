"""``warn_caller``: a warning that points at the line of the user's code."""

import sys
import warnings
from pathlib import Path

import torch

# The package itself, and torch, which wraps the methods of optimizers.
_SKIPPED = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def warn_caller(message: str) -> None:
    """Warns with the first line outside of the package and torch, so that Python tells different callers apart."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level - 1)


__all__ = ["warn_caller"]
