"""The rounds of a federation over whatever carries its messages; and all of it in one process.

In a simulation all clients share one copy of the model. A client's state between rounds is its data pointer; during its
local steps the masked values are its own and are rewound afterwards. So a thousand clients cost the memory of one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from .rejection import RejectedError, Rejection
from .server import RoundResult, Server

# What carries messages: from (client id, request) to (sender, answer) of those that answered in time, in any order.
# The sender is the client id that whoever carries it knows the answer to be from, or None where it knows no names.
Exchange = Callable[[Iterable[tuple[int, bytes]]], Iterable[tuple[int | None, bytes]]]


class ClientLike(Protocol):
    """Whoever answers requests under a client's id: a ``Client``, or a hostile one."""

    @property
    def id(self) -> int:
        """In [0, 2**32)."""

    def handle(self, message: bytes) -> bytes:
        """A reply to a request."""


def serve(server: Server, exchange: Exchange, rounds: int) -> Iterator[RoundResult]:
    """Runs some rounds over a network, or what takes its place.

    Args:
        server: at the beginning of a round.
        exchange: carries the requests of a round to the clients, and their answers back; called once a round, and once
            more for clients that stand further back than the server knew.
        rounds: number of the last round; the calibration is extra, and comes out as round 0.

    Raises:
        RoundFailedError: if no client gave a usable answer in a round, which stays open.
    """
    while server.round <= rounds:
        behind = _ask(server, exchange, server.participants())
        if behind:
            _ask(server, exchange, behind)
        yield server.finish_round()


def simulate(server: Server, clients: Sequence[ClientLike], rounds: int) -> Iterator[RoundResult]:
    """Runs some rounds in this process, one client after the other.

    Args:
        server: at the beginning of a round.
        clients: those the server knows; they may share the server's replica.
        rounds: as for ``serve``.
    """
    return serve(server, local_exchange(clients), rounds)


def local_exchange(clients: Iterable[ClientLike]) -> Exchange:
    """Carries messages to clients in this process: each is asked when its answer is wanted."""
    by_id = {client.id: client for client in clients}
    return lambda requests: ((i, by_id[i].handle(request)) for i, request in requests)


def _ask(server: Server, exchange: Exchange, clients: Sequence[int]) -> list[int]:
    """Asks some clients for this round; returns those that stand further back than their requests began."""
    behind = set()
    for sender, answer in exchange((i, server.request(i)) for i in clients):
        try:
            server.receive(answer, sender=sender)
        except RejectedError as error:  # counted by the server; the round goes on with the rest
            if error.rejection is Rejection.STALE and error.client is not None:
                behind.add(error.client)
    return sorted(behind)


__all__ = ["ClientLike", "Exchange", "local_exchange", "serve", "simulate"]
