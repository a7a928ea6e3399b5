"""``Nodes``: which of Flower's nodes is which client. Nodes come and go, and their ids are random numbers."""

from collections.abc import Callable, Iterable


class Nodes:
    """Who claimed to be whom, of the nodes that are there.

    Args:
        log: called with a line when a node comes, goes, or claims what another one has.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._claims: dict[int, int] = {}  # node -> client; who came first stands first

    def present(self, online: Iterable[int]) -> None:
        """Forgets the nodes that are no longer there; what they held goes to whoever waits for it."""
        here = frozenset(online)
        for node in [each for each in self._claims if each not in here]:
            client = self._claims.pop(node)
            self._log(f"client {client}: its node {node} has gone")

    def claim(self, node: int, client: int) -> None:
        """A node says which client it is."""
        holder = self.node_of(client)
        self._claims[node] = client
        if holder is None or holder == node:
            self._log(f"client {client} is node {node}")
        else:
            self._log(
                f"node {node} is refused: it says it is client {client}, which node {holder} is while it is there"
            )

    def node_of(self, client: int) -> int | None:
        """The node that is a client; of several that claim to be, the first."""
        return next((node for node, claimed in self._claims.items() if claimed == client), None)

    def client_of(self, node: int) -> int | None:
        """The client that a node is; None if it is none, or another is."""
        client = self._claims.get(node)
        return client if client is not None and self.node_of(client) == node else None

    def __contains__(self, node: int) -> bool:
        return node in self._claims

    def __len__(self) -> int:
        """How many clients have a node."""
        return len(set(self._claims.values()))


__all__ = ["Nodes"]
