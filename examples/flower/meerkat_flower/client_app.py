"""The engine's ClientApp, which passes messages to the node's worker."""

from meerkat_engine.fed.flower.node.app import app

__all__ = ["app"]
