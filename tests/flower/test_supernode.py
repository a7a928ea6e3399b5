"""Differences between the engine's SuperNode and Flower's, on Flower's own node state."""

import json
import subprocess
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from meerkat_engine.engine.errors import TransportError
from meerkat_engine.fed.flower.node.supernode import drop_leftover_messages, replace_module

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def answer(message: str) -> Message:
    """A ClientApp's answer to a message."""
    request = Message(RecordDict(), dst_node_id=7, message_type="train.meerkat")
    request.metadata.__dict__["_message_id"] = message
    return Message(Error(code=0, reason=message), reply_to=request)


def test_leftover_answer_is_not_sent_instead_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    store = ObjectStoreFactory()
    state = NodeStateFactory(store).state()
    start_client_internal._insert_message(answer("of a run that ended"), state, store.store())
    sent: list[str] = []

    def pull(*, state: NodeState, run: int) -> int:
        start_client_internal._insert_message(answer("of the next"), state, store.store())
        return run

    def send(message: Message, *_: Any) -> tuple[set[str], str]:
        sent.append(message.metadata.reply_to_message_id)
        return set(), ""

    monkeypatch.setattr(state, "get_message_processing_duration", lambda message_id: 0.0)
    assert drop_leftover_messages(pull)(state=state, run=5) == 5
    start_client_internal._push_messages(state, store.store(), send, lambda *_: None)
    assert sent == ["of the next"]


def test_unsupported_version_of_flower_is_an_error() -> None:
    replace_module(start_client_internal, "subprocess", Popen=subprocess.Popen)
    with pytest.raises(TransportError, match="this version of Flower does not import sockets"):
        replace_module(json, "sockets")
