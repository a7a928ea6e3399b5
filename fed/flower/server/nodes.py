"""``Nodes``: assignment of Flower nodes to clients. Nodes come and go, and their ids are random numbers."""

from collections.abc import Callable, Iterable


class Nodes:
    """The client that each online node claims to be.

    Args:
        log: called with a line when a node comes, goes, or claims a client that another node holds.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._claims: dict[int, int] = {}  # node -> client, in order of arrival: the first claim counts

    def keep_online(self, online: Iterable[int]) -> None:
        """Forgets the nodes that are offline; the next node that claimed the same client gets it.

        Args:
            online: ids of the nodes that are online.
        """
        online = frozenset(online)
        for node in [node for node in self._claims if node not in online]:
            client = self._claims.pop(node)
            self._log(f"client {client}: its node {node} went offline")

    def claim(self, node: int, client: int) -> None:
        """Records that a node claims to be a client."""
        holder = self.node_of(client)
        self._claims[node] = client
        if holder is None or holder == node:
            self._log(f"client {client} is node {node}")
        else:
            self._log(f"node {node} is rejected: it claims to be client {client}, which is node {holder}")

    def node_of(self, client: int) -> int | None:
        """The node of a client: the first that claimed to be it; None if there is none."""
        return next((node for node, claimed_examples in self._claims.items() if claimed_examples == client), None)

    def client_of(self, node: int) -> int | None:
        """The client of a node; None if it claimed none, or one that another node holds."""
        client = self._claims.get(node)
        return client if client is not None and self.node_of(client) == node else None

    def __contains__(self, node: int) -> bool:
        return node in self._claims

    def __len__(self) -> int:
        """Number of clients that have a node."""
        return len(set(self._claims.values()))


__all__ = ["Nodes"]
