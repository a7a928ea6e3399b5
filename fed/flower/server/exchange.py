"""``GridExchange``: carries a federation's messages over Flower's Grid, and waits for nobody beyond a deadline."""

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ....engine.errors import TransportError
from ..polling import LOOK, shorten_backoff
from ..records import DISMISSAL, INTRODUCTION, ROUND, RunDescription, answer_of, client_of, round_content
from .nodes import Nodes

# Seconds that a part of an answer is waited for, whose other parts are there.
_PART = 20.0
# Seconds that a message lives longer than it is waited for: clocks of other machines are not ours.
_GRACE = 60.0
# Seconds after which a node that could not take part is told of the run again.
_AGAIN = 60.0
# Seconds after which it is said again how many nodes have come.
_STILL = 30.0


class GridExchange:
    """An ``Exchange`` (see ``fed.simulation``) whose clients are Flower nodes.

    Every node is told of the run once, and says which client it is; one that was started anew is told again, in the
    same round.

    Args:
        grid: of the ServerApp.
        setup: makes what a node has to know; called when the first one is to be told.
        deadline: seconds that answers are waited for, in each call.
        at_least: clients that must have a node before the first round.
        wait: seconds that these are waited for.
        log: called with a line about nodes that come, go, fail or are late, and about the time of each call.
    """

    def __init__(
        self,
        grid: Grid,
        setup: Callable[[], RunDescription],
        *,
        deadline: float,
        at_least: int,
        wait: float,
        log: Callable[[str], None],
    ) -> None:
        if not shorten_backoff(_PART):
            log("this version of Flower waits in another way: answers may come a second late")
        self.nodes = Nodes(log)
        self._grid, self._make_setup, self._log = grid, setup, log
        self._deadline, self._at_least, self._wait = deadline, at_least, wait
        self._setup: RunDescription | None = None
        self._unread: set[str] = set()  # why answers could not be read
        self._introductions: dict[str, int] = {}  # message -> node, of those that wait for an answer
        self._unfit: dict[int, float] = {}  # nodes that cannot take part -> since when

    @property
    def setup(self) -> RunDescription:
        """What the nodes are told."""
        if self._setup is None:
            self._setup = self._make_setup()
        return self._setup

    def gather(self) -> None:
        """Waits until enough nodes have said who they are.

        Raises:
            TransportError: if too few come.
        """
        began = said = time.monotonic()
        self._greet()
        if len(self.nodes) < self._at_least:
            self._log(f"waiting up to {self._wait:g} s for nodes of {self._at_least} clients")
        while len(self.nodes) < self._at_least:
            late = time.monotonic() > began + self._wait
            if time.monotonic() > said + _STILL:
                said = time.monotonic()
                self._log(f"{len(self.nodes)} of {self._at_least} clients have a node after {said - began:.0f} s")
            for _ in self._answers({}):
                raise AssertionError("nobody was asked for anything")
            if late and len(self.nodes) < self._at_least:
                raise TransportError(
                    f"{len(self.nodes)} of {self._at_least} clients have a node after {self._wait:g} s; start the "
                    f"others, or lower min-nodes"
                )
            time.sleep(LOOK)
            self._greet()
        self._at_least = 0  # from now on, rounds go on with those that are there

    def __call__(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """Carries requests to the clients that have a node, and brings what they answer in time."""
        self.gather()
        begun, slowest, count = time.monotonic(), 0.0, 0
        wanted, sent = dict(requests), dict[str, int]()
        while True:
            sent |= self._sent(wanted, sent, begun + self._deadline - time.monotonic())
            if not sent and not self._coming(wanted):
                if count or not wanted:
                    break
                self._greet()  # nobody who is wanted is there: until the deadline, somebody may come
            if time.monotonic() > begun + self._deadline:
                late = set(sent.values()) | self._coming(wanted) or set(wanted)
                self._log(f"no answer within {self._deadline:g} s from client {', '.join(map(str, sorted(late)))}")
                break
            for client, answer, seconds in self._answers(sent):
                if answer is not None:
                    count, slowest = count + 1, max(slowest, seconds)
                    yield client, answer
                if answer is not None or not self._coming({client: b""}):
                    del wanted[client]
            time.sleep(LOOK)
        self._log(
            f"{count} answers in {time.monotonic() - begun:.2f} s, of which the slowest worker took {slowest:.2f}"
        )

    def dismiss(self, seconds: float = 10.0) -> None:
        """Lets the nodes go, so that their workers end; waits until they heard, but not long."""
        if self._setup is None:
            return
        left = set(self._post({node: RecordDict() for node in self._grid.get_node_ids()}, DISMISSAL, seconds))
        until = time.monotonic() + seconds
        while left and time.monotonic() < until:
            time.sleep(LOOK)
            left -= {reply.metadata.reply_to_message_id for reply in self._pulled(list(left))}

    def _greet(self) -> None:
        """Tells nodes that are new of the run."""
        online, now = list(self._grid.get_node_ids()), time.monotonic()
        self.nodes.present(online)
        self._unfit = {node: at for node, at in self._unfit.items() if node in online and now < at + _AGAIN}
        known = {*self._introductions.values(), *self._unfit}
        self._introduce([node for node in online if node not in self.nodes and node not in known])

    def _introduce(self, nodes: list[int]) -> None:
        if nodes:
            content = self.setup.content()
            self._introductions |= self._post(dict.fromkeys(nodes, content), INTRODUCTION, self.setup.seconds)

    def _coming(self, wanted: dict[int, bytes]) -> set[int]:
        """Clients that are to be asked as soon as their node, which forgot the run, knows it again."""
        return {i for node in self._introductions.values() if (i := self.nodes.client_of(node)) in wanted}

    def _sent(self, wanted: dict[int, bytes], sent: dict[str, int], seconds: float) -> dict[str, int]:
        """Sends what is wanted, and was not sent, from clients whose node knows the run; message -> client."""
        busy, under_way = set(self._introductions.values()), set(sent.values())
        nodes = {i: self.nodes.node_of(i) for i in wanted if i not in under_way}
        clients = {node: i for i, node in nodes.items() if node is not None and node not in busy}
        content = {
            node: round_content(self.setup.session, wanted[i], max(seconds, 0.0), 2 * self._deadline + 300)
            for node, i in clients.items()
        }
        return {id: clients[node] for id, node in self._post(content, ROUND, seconds).items()}

    def _post(self, contents: dict[int, RecordDict], kind: str, seconds: float) -> dict[str, int]:
        """Sends messages to nodes; message -> node, of those that Flower took."""
        if not contents:
            return {}
        messages = [
            Message(content, dst_node_id=node, message_type=kind, ttl=max(seconds, 0.0) + _GRACE)
            for node, content in contents.items()
        ]
        return {id: node for id, node in zip(self._grid.push_messages(messages), contents, strict=True) if id}

    def _answers(self, sent: dict[str, int]) -> Iterator[tuple[int, bytes | None, float]]:
        """What has come since the last look, taken out of ``sent``: client, answer or None, seconds that it took."""
        if not sent and not self._introductions:
            return
        for reply in self._pulled([*sent, *self._introductions]):
            id = reply.metadata.reply_to_message_id
            if id in self._introductions:
                self._introduced(self._introductions.pop(id), reply)
            elif id in sent:
                client = sent.pop(id)
                yield client, *self._answered(client, reply)

    def _pulled(self, ids: list[str]) -> list[Message]:
        """What Flower has of the answers; one that it cannot read, whoever made it, ends no run."""
        try:
            return list(self._grid.pull_messages(ids))
        except Exception as error:
            if (text := f"answers could not be read: {type(error).__name__}: {error}") not in self._unread:
                self._unread.add(text)
                self._log(text)
            return []

    def _introduced(self, node: int, reply: Message) -> None:
        try:
            if reply.has_error():
                raise ValueError(reply.error.reason)
            self.nodes.claim(node, client_of(reply))
        except (KeyError, TypeError, ValueError) as error:  # whatever a node makes up
            self._unfit[node] = time.monotonic()
            self._log(f"node {node} cannot take part: {error}")

    def _answered(self, client: int, reply: Message) -> tuple[bytes | None, float]:
        try:
            if reply.has_error():
                raise ValueError(reply.error.reason)
            answer, seconds = answer_of(reply)
        except (KeyError, TypeError, ValueError) as error:
            self._log(f"client {client} failed: {error}")
            return None, 0.0
        if answer is None and (node := self.nodes.node_of(client)) is not None:
            self._log(f"client {client} was started anew: it is told of the run")
            self._introduce([node])
        return answer, seconds


__all__ = ["GridExchange"]
