"""Optional packages: how to install them, and matplotlib, which several parts draw with."""

from typing import Any

from .errors import ConfigError


def install_hint(extra: str) -> str:
    """How to install an extra of this project, which is on no package index."""
    return f"in a clone of meerkat-engine, run pip install -c constraints.txt '.[{extra}]'"


def require_matplotlib() -> Any:
    """matplotlib, set to draw to files.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"figures need the package matplotlib ({error}); {install_hint('bench')}") from error
    matplotlib.use("Agg")
    return matplotlib


__all__ = ["install_hint", "require_matplotlib"]
