"""The ClientApp: passes Flower's messages to the node's worker. It loads no torch: Flower starts it for each message.

A node is configured by ``--node-config``: ``client-id`` (or ``partition-id``), ``model``, ``data``, ``data-dir``,
``mask``, ``device``, ``backend``, ``capture``, ``offload``, ``calibration-elements``.
"""

import os
import sys
from functools import cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from ....engine.errors import MeerkatError, WorkerError
from ..records import RunDescription, answer_content, error_reply, node_content, read_round
from ..strategy_records import SCALARS, cumulative_sums
from .worker_client import FrameHeader, WorkerClient

app = ClientApp()


@app.query("meerkat")
def register(message: Message, context: Context) -> Message:
    """Stores the run's description, has the worker load the run, and answers with this node's client id."""
    description = RunDescription.from_content(message.content)
    try:
        if description is None:
            raise WorkerError("this registration message holds no description of a run")
        context.state.update(message.content)  # Flower keeps it for the processes of later messages
        client = _client_id(context)
        _ask_worker(context, {"do": "setup"}, b"", description.seconds, description)
    except MeerkatError as error:
        return error_reply(str(error), message)
    return Message(node_content(client), reply_to=message)


@app.train("meerkat")
def train(message: Message, context: Context) -> Message:
    """Answers a round's request of this engine's own server."""
    request = read_round(message)
    header = {"do": "round", "session": request["session"], "idle": request["idle"]}
    description = RunDescription.from_content(context.state)
    if description is not None and description.session != request["session"]:
        description = None
    try:
        reply, answer = _ask_worker(context, header, request["request"], request["seconds"], description)
    except MeerkatError as error:
        return error_reply(str(error), message)
    return Message(answer_content(answer if reply["known"] else None, reply["seconds"]), reply_to=message)


@app.query("meerkat_end")
def release(message: Message, context: Context) -> Message:
    """Ends the worker after the run, which frees the memory of its model."""
    try:
        if _in_simulation():
            _actor_handler()({"do": "end"}, b"", 0.0)
        else:
            _node_worker(context).end()
    except MeerkatError as error:
        return error_reply(str(error), message)
    return Message(RecordDict(), reply_to=message)


@app.train()
def train_for_any_strategy(message: Message, context: Context) -> Message:
    """Answers a round of one of Flower's own strategies; see ``node.strategy``."""
    description = RunDescription.from_content(context.state)
    try:
        if description is None:
            raise WorkerError("this node has no description of the run: register it before the strategy starts")
        sums = cumulative_sums(message, context)
        header = {"do": "stock", "session": description.session}
        reply, answer = _ask_worker(context, header, sums.tobytes(), description.seconds, description)
    except MeerkatError as error:
        return error_reply(str(error), message)
    content = RecordDict({
        "arrays": ArrayRecord({SCALARS: Array(np.frombuffer(answer, dtype=np.float64))}),
        "metrics": MetricRecord({"num-examples": reply["examples"], "loss": reply["loss"]}),
    })  # fmt: skip
    return Message(content, reply_to=message)


def _client_id(context: Context) -> int:
    """The id of this node's client, from the node's configuration."""
    for key in ("client-id", "partition-id"):
        if isinstance(value := context.node_config.get(key), int):
            return value
    raise WorkerError("this node's configuration has no client id; start it with --node-config 'client-id=0'")


def _ask_worker(
    context: Context, header: FrameHeader, payload: bytes, seconds: float, description: RunDescription | None
) -> tuple[FrameHeader, bytes]:
    """Sends a frame to the worker; if the worker lacks the run and this node has its description, sends that first."""
    header |= {"client": _client_id(context)}
    ask: Any = _actor_handler() if _in_simulation() else _node_worker(context).ask
    is_setup = description is not None and header["do"] == "setup"
    reply: FrameHeader = {"known": False}
    if not is_setup:
        reply, answer = _raise_reported_error(ask(header, payload, seconds))
    if description is not None and not reply["known"]:
        setup = {"do": "setup", "session": description.session, "settings": description.settings,
                 "base": description.base, "mask": description.mask_digest,
                 "stream_version": description.stream_version, "node": dict(context.node_config),
                 "client": header["client"]}  # fmt: skip
        reply, answer = _raise_reported_error(ask(setup, description.mask, description.seconds))
        if not is_setup:
            reply, answer = _raise_reported_error(ask(header, payload, seconds))
    return reply, answer


def _raise_reported_error(frame: tuple[FrameHeader, bytes]) -> tuple[FrameHeader, bytes]:
    """Returns the worker's frame; raises ``WorkerError`` if it reports an error."""
    if "error" in frame[0]:
        raise WorkerError(str(frame[0]["error"]))
    return frame


def _in_simulation() -> bool:
    """Whether this process is an actor of Flower's simulation, which lives as long as the run and serves many nodes."""
    return "ray" in sys.modules


@cache
def _actor_handler() -> Any:
    """In a simulation: the request handler in this process, called like ``WorkerClient.ask``."""
    from .handler import RequestHandler

    handler = RequestHandler()
    return lambda header, payload, seconds: handler.handle(header, payload)


def _node_worker(context: Context) -> WorkerClient:
    """This SuperNode's worker, for one run at a time; it ends with the process that starts the ClientApps."""
    return WorkerClient(str(context.node_id), os.getppid())


__all__ = ["app", "register", "release", "train", "train_for_any_strategy"]
