"""The ClientApp: hands Flower's messages to the node's worker. It loads no torch, since Flower starts it for each.

A node says what it is and has by ``--node-config``: ``client-id`` (or ``partition-id``), ``model``, ``data``,
``data-dir``, ``mask``, ``device``, ``backend``.
"""

import os
import sys
from functools import cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from ....engine.errors import MeerkatError, WorkerError
from ..records import RunDescription, answer_content, failure, node_content, round_of
from ..strategy_records import SCALARS, cumulative_sums
from .worker_client import FrameHeader, WorkerClient

app = ClientApp()


@app.query("meerkat")
def introduce(message: Message, context: Context) -> Message:
    """Takes a run's setup, has the worker load it, and says which client this node is."""
    setup = RunDescription.of(message.content)
    try:
        if setup is None:
            raise WorkerError("an introduction brings the setup of the run, this one does not")
        context.state.update(message.content)  # kept by Flower for the next processes
        client = _client(context)
        _asked(context, {"do": "setup"}, b"", setup.seconds, setup)
    except MeerkatError as error:
        return failure(str(error), message)
    return Message(node_content(client), reply_to=message)


@app.train("meerkat")
def train(message: Message, context: Context) -> Message:
    """A round of this engine's own server."""
    asked = round_of(message)
    header = {"do": "round", "session": asked["session"], "idle": asked["idle"]}
    setup = RunDescription.of(context.state)
    if setup is not None and setup.session != asked["session"]:
        setup = None
    try:
        found, answer = _asked(context, header, asked["request"], asked["seconds"], setup)
    except MeerkatError as error:
        return failure(str(error), message)
    return Message(answer_content(answer if found["known"] else None, found["seconds"]), reply_to=message)


@app.query("meerkat_end")
def leave(message: Message, context: Context) -> Message:
    """The run is over: the worker, and the memory that its model takes, are not needed any more."""
    try:
        if _in_simulation():
            _here()({"do": "end"}, b"", 0.0)
        else:
            _elsewhere(context).end()
    except MeerkatError as error:
        return failure(str(error), message)
    return Message(RecordDict(), reply_to=message)


@app.train()
def train_for_any_strategy(message: Message, context: Context) -> Message:
    """A round of one of Flower's own strategies; see ``stock``."""
    setup = RunDescription.of(context.state)
    try:
        if setup is None:
            raise WorkerError("this node knows nothing of the run: introduce it before the strategy starts")
        sums = cumulative_sums(message, context)
        header = {"do": "stock", "session": setup.session}
        found, answer = _asked(context, header, sums.tobytes(), setup.seconds, setup)
    except MeerkatError as error:
        return failure(str(error), message)
    content = RecordDict({
        "arrays": ArrayRecord({SCALARS: Array(np.frombuffer(answer, dtype=np.float64))}),
        "metrics": MetricRecord({"num-examples": found["examples"], "loss": found["loss"]}),
    })  # fmt: skip
    return Message(content, reply_to=message)


def _client(context: Context) -> int:
    """Which client this node is."""
    for key in ("client-id", "partition-id"):
        if isinstance(found := context.node_config.get(key), int):
            return found
    raise WorkerError("this node does not say which client it is; start it with --node-config 'client-id=0'")


def _asked(
    context: Context, header: FrameHeader, payload: bytes, seconds: float, setup: RunDescription | None
) -> tuple[FrameHeader, bytes]:
    """Asks the worker; one that was started anew is told of the run first, if this node knows it."""
    header |= {"client": _client(context)}
    mask_coverage: Any = _here() if _in_simulation() else _elsewhere(context).ask
    telling = setup is not None and header["do"] == "setup"
    found: FrameHeader = {"known": False}
    if not telling:
        found, answer = _checked(mask_coverage(header, payload, seconds))
    if setup is not None and not found["known"]:
        told = {"do": "setup", "session": setup.session, "settings": setup.settings, "base": setup.base,
                "mask": setup.mask_digest, "node": dict(context.node_config), "client": header["client"]}  # fmt: skip
        found, answer = _checked(mask_coverage(told, setup.mask, setup.seconds))
        if not telling:
            found, answer = _checked(mask_coverage(header, payload, seconds))
    return found, answer


def _checked(found: tuple[FrameHeader, bytes]) -> tuple[FrameHeader, bytes]:
    if "error" in found[0]:
        raise WorkerError(str(found[0]["error"]))
    return found


def _in_simulation() -> bool:
    """Whether this is one of the simulation's actors, which live as long as the run and serve many nodes."""
    return "ray" in sys.modules


@cache
def _here() -> Any:
    from .handler import RequestHandler

    resident = RequestHandler()
    return lambda header, payload, seconds: resident.handle(header, payload)


def _elsewhere(context: Context) -> WorkerClient:
    """The worker of this SuperNode, for one run at a time; it ends with what starts this process for every message."""
    return WorkerClient(str(context.node_id), os.getppid())


__all__ = ["app", "introduce", "leave", "train", "train_for_any_strategy"]
