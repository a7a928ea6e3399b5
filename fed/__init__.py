"""Federation on top of the engine: server and clients that exchange scalars, the ledger, and whole runs."""

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
