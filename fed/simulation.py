"""A whole federation in one process: server and clients exchange the messages that a network would carry.

All clients share one copy of the model. A client's state between rounds is its data pointer; during its local steps the
masked values are its own and are rewound afterwards. So a thousand clients cost the memory of one.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from ..errors import MessageError
from .server import RoundResult, Server


class Participant(Protocol):
    """Whoever answers requests under a client's id: a ``Client``, or a hostile one."""

    @property
    def id(self) -> int:
        """In [0, 2**32)."""

    def handle(self, message: bytes) -> bytes:
        """A reply to a request."""


def simulate(server: Server, clients: Sequence[Participant], rounds: int) -> Iterator[RoundResult]:
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
                server.receive(reply, sender=client.id)
            except MessageError:
                continue  # refused and counted by the server; the round goes on with the rest
        yield server.finish_round()


__all__ = ["Participant", "simulate"]
