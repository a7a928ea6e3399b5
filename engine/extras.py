"""matplotlib, which only the figures need."""

from typing import Any

from .errors import ConfigError


def require_matplotlib() -> Any:
    """matplotlib, drawing to files.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"figures need matplotlib: pip install 'meerkat-engine[bench]' ({error})") from error
    matplotlib.use("Agg")
    return matplotlib


__all__ = ["require_matplotlib"]
