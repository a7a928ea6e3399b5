"""The engine's ServerApp: change the settings in pyproject.toml, or call ``serve_run`` from a ServerApp of your own."""

from meerkat_engine.fed.flower.server.app import app

__all__ = ["app"]
