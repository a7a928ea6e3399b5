"""The engine's ClientApp, which hands messages to the node's resident worker."""

from meerkat_engine.fed.flower.node.app import app

__all__ = ["app"]
