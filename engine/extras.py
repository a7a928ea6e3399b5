"""Optional packages: installation hints, and the import of matplotlib."""

from typing import Any

from .errors import ConfigError


def install_hint(extra: str) -> str:
    """Returns a hint how to install an extra from a clone; the project is not on a package index."""
    return f"in a clone of meerkat-engine, run pip install -c constraints.txt '.[{extra}]'"


def require_matplotlib() -> Any:
    """Imports matplotlib and sets it to draw to files.

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
