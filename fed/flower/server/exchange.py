"""``GridExchange``: carries a federation's messages over Flower's Grid, up to a deadline."""

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ....engine.errors import TransportError
from ..polling import POLL_SECONDS, shorten_backoff
from ..records import REGISTRATION, RELEASE, ROUND, RunDescription, read_answer, read_client, round_content
from .nodes import Nodes

# Seconds to wait for a missing part of an answer whose other parts have come.
_PART_SECONDS = 20.0
# Seconds that a message stays valid after its deadline, since the clocks of other machines differ.
_TTL_MARGIN = 60.0
# Seconds after which a node that could not take part is sent the registration again.
_RETRY_SECONDS = 60.0
# Seconds between log lines about the number of nodes that have come.
_LOG_SECONDS = 30.0


class GridExchange:
    """An ``Exchange`` (see ``fed.exchange``) whose clients are Flower nodes.

    Every node is registered once: it receives the run's description and answers with its client id. A node that was
    restarted is registered again, in the same round.

    Args:
        grid: the ServerApp's Grid.
        make_description: makes the run's description; called when the first node is registered.
        deadline: seconds that each call waits for answers.
        at_least: number of clients that must have a node before the first round.
        wait: seconds to wait for these nodes.
        log: called with a line for each node that comes, goes, fails or is late, and with the time of each call.

    Attributes:
        nodes: the nodes that are registered, and their clients.
    """

    def __init__(
        self,
        grid: Grid,
        make_description: Callable[[], RunDescription],
        *,
        deadline: float,
        at_least: int,
        wait: float,
        log: Callable[[str], None],
    ) -> None:
        if not shorten_backoff(_PART_SECONDS):
            log("this version of Flower has no backoff that can be shortened: answers may come a second late")
        self.nodes = Nodes(log)
        self._grid, self._make_description, self._log = grid, make_description, log
        self._deadline, self._at_least, self._wait = deadline, at_least, wait
        self._description: RunDescription | None = None
        self._read_errors: set[str] = set()  # errors of unreadable answers that were logged
        self._registrations: dict[str, int] = {}  # message -> node, of registrations without an answer so far
        self._failed_nodes: dict[int, float] = {}  # node that could not take part -> time of its failure

    @property
    def description(self) -> RunDescription:
        """The run's description that nodes receive."""
        if self._description is None:
            self._description = self._make_description()
        return self._description

    def wait_for_nodes(self) -> None:
        """Waits until enough clients have a node.

        Raises:
            TransportError: if too few come in time.
        """
        began = logged = time.monotonic()
        self._register_new_nodes()
        if len(self.nodes) < self._at_least:
            self._log(f"waiting up to {self._wait:g} s for nodes of {self._at_least} clients")
        while len(self.nodes) < self._at_least:
            is_late = time.monotonic() > began + self._wait
            if time.monotonic() > logged + _LOG_SECONDS:
                logged = time.monotonic()
                self._log(f"{len(self.nodes)} of {self._at_least} clients have a node after {logged - began:.0f} s")
            for _ in self._answers({}):
                raise AssertionError("an answer came although no request was sent")
            if is_late and len(self.nodes) < self._at_least:
                raise TransportError(
                    f"{len(self.nodes)} of {self._at_least} clients have a node after {self._wait:g} s; start the "
                    f"others, or lower min-nodes"
                )
            time.sleep(POLL_SECONDS)
            self._register_new_nodes()
        self._at_least = 0  # later rounds use the nodes that are online

    def __call__(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """Sends requests to the clients that have a node, and yields the answers that come before the deadline.

        Args:
            requests: pairs of client id and encoded request.
        """
        self.wait_for_nodes()
        begun, slowest, count = time.monotonic(), 0.0, 0
        pending, sent = dict(requests), dict[str, int]()
        while True:
            sent |= self._send(pending, sent, begun + self._deadline - time.monotonic())
            if not sent and not self._in_registration(pending):
                if count or not pending:
                    break
                self._register_new_nodes()  # no pending client has a node: one may come before the deadline
            if time.monotonic() > begun + self._deadline:
                late = set(sent.values()) | self._in_registration(pending) or set(pending)
                self._log(f"no answer within {self._deadline:g} s from client {', '.join(map(str, sorted(late)))}")
                break
            for client, answer, seconds in self._answers(sent):
                if answer is not None:
                    count, slowest = count + 1, max(slowest, seconds)
                    yield client, answer
                if answer is not None or not self._in_registration({client: b""}):
                    del pending[client]
            time.sleep(POLL_SECONDS)
        self._log(
            f"{count} answers in {time.monotonic() - begun:.2f} s, of which the slowest worker took {slowest:.2f}"
        )

    def release_nodes(self, seconds: float = 10.0) -> None:
        """Reports the end of the run to all nodes, so that their workers end.

        Args:
            seconds: how long to wait for their answers, at most.
        """
        if self._description is None:
            return
        unanswered = set(self._post({node: RecordDict() for node in self._grid.get_node_ids()}, RELEASE, seconds))
        until = time.monotonic() + seconds
        while unanswered and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            unanswered -= {reply.metadata.reply_to_message_id for reply in self._pull(list(unanswered))}

    def _register_new_nodes(self) -> None:
        """Sends the run's description to the nodes that are online and not registered."""
        online, now = list(self._grid.get_node_ids()), time.monotonic()
        self.nodes.keep_online(online)
        self._failed_nodes = {
            node: failed_at
            for node, failed_at in self._failed_nodes.items()
            if node in online and now < failed_at + _RETRY_SECONDS
        }
        excluded = {*self._registrations.values(), *self._failed_nodes}
        self._register([node for node in online if node not in self.nodes and node not in excluded])

    def _register(self, nodes: list[int]) -> None:
        if nodes:
            content = self.description.to_content()
            self._registrations |= self._post(dict.fromkeys(nodes, content), REGISTRATION, self.description.seconds)

    def _in_registration(self, pending: dict[int, bytes]) -> set[int]:
        """The pending clients whose node was restarted and is being registered again; they get their request then."""
        return {i for node in self._registrations.values() if (i := self.nodes.client_of(node)) in pending}

    def _send(self, pending: dict[int, bytes], sent: dict[str, int], seconds: float) -> dict[str, int]:
        """Sends the pending requests that were not sent yet, to registered nodes; returns message -> client."""
        registering, sent_to = set(self._registrations.values()), set(sent.values())
        nodes = {i: self.nodes.node_of(i) for i in pending if i not in sent_to}
        clients = {node: i for i, node in nodes.items() if node is not None and node not in registering}
        content = {
            node: round_content(self.description.session, pending[i], max(seconds, 0.0), 2 * self._deadline + 300)
            for node, i in clients.items()
        }
        return {id: clients[node] for id, node in self._post(content, ROUND, seconds).items()}

    def _post(self, contents: dict[int, RecordDict], kind: str, seconds: float) -> dict[str, int]:
        """Sends messages to nodes; returns message -> node, for those that Flower accepted."""
        if not contents:
            return {}
        messages = [
            Message(content, dst_node_id=node, message_type=kind, ttl=max(seconds, 0.0) + _TTL_MARGIN)
            for node, content in contents.items()
        ]
        return {id: node for id, node in zip(self._grid.push_messages(messages), contents, strict=True) if id}

    def _answers(self, sent: dict[str, int]) -> Iterator[tuple[int, bytes | None, float]]:
        """Processes the replies that have come; removes from ``sent`` and yields those to requests.

        Yields:
            Client, answer (None if there is none) and seconds that the worker took.
        """
        if not sent and not self._registrations:
            return
        for reply in self._pull([*sent, *self._registrations]):
            id = reply.metadata.reply_to_message_id
            if id in self._registrations:
                self._finish_registration(self._registrations.pop(id), reply)
            elif id in sent:
                client = sent.pop(id)
                yield client, *self._handle_answer(client, reply)

    def _pull(self, ids: list[str]) -> list[Message]:
        """Fetches replies from Flower. An unreadable reply, whichever node made it, does not end the run."""
        try:
            return list(self._grid.pull_messages(ids))
        except Exception as error:
            if (text := f"answers could not be read: {type(error).__name__}: {error}") not in self._read_errors:
                self._read_errors.add(text)
                self._log(text)
            return []

    def _finish_registration(self, node: int, reply: Message) -> None:
        try:
            if reply.has_error():
                raise ValueError(reply.error.reason)
            self.nodes.claim(node, read_client(reply))
        except (KeyError, TypeError, ValueError) as error:  # a reply can hold anything
            self._failed_nodes[node] = time.monotonic()
            self._log(f"node {node} cannot take part: {error}")

    def _handle_answer(self, client: int, reply: Message) -> tuple[bytes | None, float]:
        """Returns a reply's answer and its seconds; registers the client's node again if it no longer has the run."""
        try:
            if reply.has_error():
                raise ValueError(reply.error.reason)
            answer, seconds = read_answer(reply)
        except (KeyError, TypeError, ValueError) as error:
            self._log(f"client {client} failed: {error}")
            return None, 0.0
        if answer is None and (node := self.nodes.node_of(client)) is not None:
            self._log(f"client {client}: node {node} no longer has the run; it is registered again")
            self._register([node])
        return answer, seconds


__all__ = ["GridExchange"]
