"""The engine's ServerApp. Change the settings in pyproject.toml, or call ``serve_run`` from your own ServerApp."""

from meerkat_engine.fed.flower.server.app import app

__all__ = ["app"]
