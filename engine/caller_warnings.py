"""``warn_caller``: a warning that points at the line of the user's code."""

import sys
import warnings

# By module, not by file: in a clone, a user's scripts and virtual environment may lie in the package's own folder.
_SKIPPED = {__name__.partition(".")[0], "torch"}  # torch wraps the methods of optimizers


def warn_caller(message: str) -> None:
    """Warns with the first line outside of the package and torch, so that Python tells different callers apart."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _SKIPPED:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


__all__ = ["warn_caller"]
