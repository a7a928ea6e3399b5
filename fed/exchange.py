"""Runs the rounds of a federation over any transport, or in one process.

In a simulation all clients share one copy of the model. Between rounds a client's only own state is its data pointer.
During local steps it changes the masked weights, which are restored afterwards. So the models of a thousand clients
take the memory of one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from .rejection import RejectedError, Rejection
from .server import RoundResult, Server

# The transport of messages. Takes pairs (client id, request) and returns pairs (sender, answer) from the clients that
# answered in time, in any order. The sender is the client id that the transport authenticated, or None if it does not
# authenticate senders.
Exchange = Callable[[Iterable[tuple[int, bytes]]], Iterable[tuple[int | None, bytes]]]


class ClientLike(Protocol):
    """Interface of clients: a ``Client``, or a ``HostileClient``."""

    @property
    def id(self) -> int:
        """The client's id, in [0, 2**32)."""

    def handle(self, message: bytes) -> bytes:
        """Answers an encoded request with an encoded reply."""


def serve(server: Server, exchange: Exchange, rounds: int) -> Iterator[RoundResult]:
    """Runs rounds over a transport.

    A round that was interrupted, or had no usable answer, continues with the clients whose answers are missing.

    Args:
        server: the server, in any round.
        exchange: the transport. It is called once a round, and a second time if there are stale clients.
        rounds: number of the last round. The calibration is run in addition, as round 0.

    Yields:
        The result of each round.

    Raises:
        RoundFailedError: if no client sent a usable answer in a round; the round stays open.
    """
    while server.round <= rounds:
        stale = _exchange_messages(server, exchange, server.unanswered())
        if stale:
            _exchange_messages(server, exchange, stale)
        yield server.finish_round()


def simulate(server: Server, clients: Sequence[ClientLike], rounds: int) -> Iterator[RoundResult]:
    """Runs rounds in this process, one client after the other.

    Args:
        server: the server, in any round.
        clients: the server's clients, which may share the server's replica.
        rounds: see ``serve``.
    """
    return serve(server, local_exchange(clients), rounds)


def local_exchange(clients: Iterable[ClientLike]) -> Exchange:
    """Returns a transport to clients in this process. A client computes its answer when the answer is iterated over."""
    by_id = {client.id: client for client in clients}
    return lambda requests: ((i, by_id[i].handle(request)) for i, request in requests)


def _exchange_messages(server: Server, exchange: Exchange, clients: Sequence[int]) -> list[int]:
    """Sends the round's requests to some clients and receives their answers; returns the ids of the stale clients."""
    stale = set()
    if not clients:
        return []
    for sender, answer in exchange((i, server.request(i)) for i in clients):
        try:
            server.receive(answer, sender=sender)
        except RejectedError as error:  # the server counts it; the round continues without the message
            if error.rejection is Rejection.STALE and error.client is not None:
                stale.add(error.client)
    return sorted(stale)


__all__ = ["ClientLike", "Exchange", "local_exchange", "serve", "simulate"]
