"""Federation on top of the engine: server and clients that exchange scalars, the ledger, and whole runs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Client, ClientData
    from .config import RunConfig, make_config
    from .joining import catch_up
    from .ledger import read_ledger
    from .messages import TrainReply, TrainRequest
    from .replica import Replica
    from .run import execute, resume
    from .server import Server
    from .simulation import serve, simulate
    from .terms import Terms

__all__ = [
    "Client",
    "ClientData",
    "Replica",
    "RunConfig",
    "Server",
    "Terms",
    "TrainReply",
    "TrainRequest",
    "catch_up",
    "execute",
    "make_config",
    "read_ledger",
    "resume",
    "serve",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """A public name, when it is first asked for: see ``meerkat_engine``."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import client, config, joining, ledger, messages, replica, run, server, simulation, terms

    modules = (client, config, joining, ledger, messages, replica, run, server, simulation, terms)
    globals()[name] = next(getattr(module, name) for module in modules if name in module.__all__)
    return globals()[name]
