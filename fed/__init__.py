"""Federated training on top of the engine: server and clients that exchange scalars, ledger, and complete runs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Client as Client
    from .client import ClientData as ClientData
    from .config.run_config import RunConfig as RunConfig
    from .config.run_config import make_config as make_config
    from .exchange import serve as serve
    from .exchange import simulate as simulate
    from .ledger.catch_up import catch_up as catch_up
    from .ledger.file import read_ledger as read_ledger
    from .messages import TrainReply as TrainReply
    from .messages import TrainRequest as TrainRequest
    from .replica import Replica as Replica
    from .run.execute import execute as execute
    from .run.execute import resume as resume
    from .server import Server as Server
    from .setup.pool import RemotePool as RemotePool
    from .terms import Terms as Terms

# Module of each public name; see ``meerkat_engine``.
_MODULES = {
    "Client": "client",
    "ClientData": "client",
    "RemotePool": "setup.pool",
    "Replica": "replica",
    "RunConfig": "config.run_config",
    "Server": "server",
    "Terms": "terms",
    "TrainReply": "messages",
    "TrainRequest": "messages",
    "catch_up": "ledger.catch_up",
    "execute": "run.execute",
    "make_config": "config.run_config",
    "read_ledger": "ledger.file",
    "resume": "run.execute",
    "serve": "exchange",
    "simulate": "exchange",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
