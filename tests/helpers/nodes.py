"""Flower nodes in this process, each with its own worker and model, and the Grid that reaches them."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from meerkat_engine.fed.flower.node import app as client_app
from meerkat_engine.fed.flower.node.handler import RequestHandler


@dataclass
class Node:
    """A SuperNode's state: the context that Flower keeps between messages, and the node's worker.

    Attributes:
        context: Flower's context.
        handler: the worker's request handler.
        operations: ``do`` of each frame that the worker received.
        ended: whether the worker was ended.
    """

    context: Context
    handler: RequestHandler = field(default_factory=RequestHandler)
    operations: list[str] = field(default_factory=list)
    ended: bool = False

    @classmethod
    def numbered(cls, i: int) -> "Node":
        """The node of client ``i``; its id is ``100 + i``."""
        return cls(Context(1, 100 + i, {"client-id": i}, RecordDict(), {}))

    def ask(self, header: Any, payload: bytes, seconds: float) -> tuple[Any, bytes]:
        """Replaces ``WorkerClient.ask``."""
        self.operations.append(header["do"])
        return self.handler.handle(header, payload)

    def end(self) -> None:
        """Replaces ``WorkerClient.end``, but keeps the model for the tests to inspect."""
        self.ended = True


class LocalGrid(Grid):
    """Delivers messages to a ClientApp immediately; its exceptions become error replies, as in a SuperNode.

    Args:
        nodes: the nodes that are online.
        app: the ClientApp.
        patch: replaces Flower's identity of a task, and the ClientApp's way to the worker.

    Attributes:
        nodes: node id -> node.
        deaf: ids of nodes that receive no messages.
        errors: reasons of all error replies.
    """

    def __init__(self, nodes: Iterable[Node], app: ClientApp, patch: pytest.MonkeyPatch) -> None:
        self.nodes = {node.context.node_id: node for node in nodes}
        self.deaf: set[int] = set()
        self.errors: list[str] = []
        self._app, self._replies = app, dict[str, Message]()

        patch.setattr(TaskIdentity, "_run_id", 1)
        patch.setattr(TaskIdentity, "_node_id", 1)
        patch.setattr(TaskIdentity, "_task_id", 1)
        patch.setattr(client_app, "_in_simulation", lambda: False)
        patch.setattr(client_app, "_node_worker", lambda context: self.nodes[context.node_id])

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message = deepcopy(message)
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            node = message.metadata.dst_node_id
            if node not in self.deaf:
                reply = self._app(message, self.nodes[node].context)
                if reply.has_error():
                    self.errors.append(reply.error.reason)
                self._replies[message.metadata.message_id] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(id) for id in list(message_ids) if id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        raise NotImplementedError
