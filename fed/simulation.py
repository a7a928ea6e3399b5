"""A whole federation in one process: server and clients exchange the messages that a network would carry.

All clients share one copy of the model. A client's state between rounds is its data pointer; during its local steps the
masked values are its own and are rewound afterwards. So a thousand clients cost the memory of one.
"""

from collections.abc import Iterator

from ..errors import MessageError
from .client import Client
from .server import RoundResult, Server


def simulate(server: Server, clients: list[Client], rounds: int) -> Iterator[RoundResult]:
    """Runs some rounds, one client after the other.

    Args:
        server: at the beginning of a round.
        clients: those the server knows; they may share the server's replica.
        rounds: number of the last round; the calibration is extra, and comes out as round 0.
    """
    by_id = {client.id: client for client in clients}
    while server.round <= rounds:
        for client in (by_id[i] for i in server.participants()):
            reply = client.handle(server.request(client.id))
            try:
                server.receive(reply)
            except MessageError:
                continue  # refused and counted by the server; the round goes on with the rest
        yield server.finish_round()


__all__ = ["simulate"]
