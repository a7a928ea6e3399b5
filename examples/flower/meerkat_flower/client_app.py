"""The engine's ClientApp, which hands messages to the node's resident worker."""

from meerkat_engine.fed.flower.client_app import app

__all__ = ["app"]
