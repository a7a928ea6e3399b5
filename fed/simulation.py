"""A whole federation in one process: server and clients exchange the messages that a network would carry.

All clients share one copy of the model. A client's state between rounds is its data pointer; during its local steps the
masked values are its own and are rewound afterwards. So a thousand clients cost the memory of one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass
class Traffic:
    """Bytes sent, headers included: up from the clients, down to them; and the number of messages."""

    up: int = 0
    down: int = 0
    messages: int = 0  # each way


@dataclass(frozen=True)
class SimulatedRound:
    """A round and what it sent."""

    result: RoundResult
    traffic: Traffic


def simulate(server: Server, clients: Sequence[Participant], rounds: int) -> Iterator[SimulatedRound]:
    """Runs some rounds, one client after the other.

    Args:
        server: at the beginning of a round.
        clients: those the server knows; they may share the server's replica.
        rounds: number of the last round; the calibration is extra, and comes out as round 0.
    """
    by_id = {client.id: client for client in clients}
    while server.round <= rounds:
        traffic = Traffic()
        for client in (by_id[i] for i in server.participants()):
            request = server.request(client.id)
            reply = client.handle(request)
            traffic.down += len(request)
            traffic.up += len(reply)
            traffic.messages += 1
            try:
                server.receive(reply, sender=client.id)
            except MessageError:
                continue  # refused and counted by the server; the round goes on with the rest
        yield SimulatedRound(server.finish_round(), traffic)


__all__ = ["Participant", "SimulatedRound", "Traffic", "simulate"]
