"""Contents of the Flower messages between ServerApp and ClientApp: how they are written and read."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

# Message types: the server describes the run and the node answers with its client id; a round's request; the end of
# the run.
REGISTRATION = "query.meerkat"
ROUND = "train.meerkat"
RELEASE = "query.meerkat_end"
# Flower's error code for a ClientApp that raised an exception; Flower sees this engine's errors as such.
_CLIENT_APP_RAISED = 2
_SETUP, _MASK, _ROUND, _NODE = "meerkat-setup", "meerkat-mask", "meerkat-round", "meerkat-node"


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """Everything that a node needs to join a run.

    Args:
        settings: the run's settings as TOML, without those that concern the server alone.
        base: fingerprint of the base model.
        mask_digest: digest of the mask.
        stream_version: version of the perturbation stream.
        mask: contents of the mask's file; empty if the node has the file or makes the mask itself.
        seconds: time limit for a node to load the run.
    """

    settings: str
    base: str
    mask_digest: str
    stream_version: int
    mask: bytes
    seconds: float

    @property
    def session(self) -> str:
        """Identifier of the run: a SHA-256 over settings, base model and mask digest."""
        return sha256("\n".join((self.settings, self.base, self.mask_digest)).encode()).hexdigest()

    def to_content(self) -> RecordDict:
        """Returns the description as Flower records; the mask is an array, which Flower sends in parts."""
        plain: dict[str, Any] = {
            "settings": self.settings,
            "base": self.base,
            "mask": self.mask_digest,
            "stream_version": self.stream_version,
            "seconds": self.seconds,
        }
        array = np.frombuffer(self.mask, dtype=np.uint8)
        return RecordDict({_SETUP: ConfigRecord(plain), _MASK: ArrayRecord({"file": Array(array)})})

    @classmethod
    def from_content(cls, content: RecordDict) -> "RunDescription | None":
        """Reads the description in a message or in a node's state; None if there is none."""
        if _SETUP not in content.config_records or _MASK not in content.array_records:
            return None
        plain = content.config_records[_SETUP]
        return cls(
            settings=str(plain["settings"]),
            base=str(plain["base"]),
            mask_digest=str(plain["mask"]),
            stream_version=int(str(plain["stream_version"])),
            seconds=float(str(plain["seconds"])),
            mask=content.array_records[_MASK]["file"].numpy().tobytes(),
        )


def round_content(session: str, request: bytes, seconds: float, idle: float) -> RecordDict:
    """Makes the content of a round's message to a node.

    Args:
        session: session of the run; see ``RunDescription.session``.
        request: encoded request; see ``fed.messages``.
        seconds: how long the server waits for the answer.
        idle: seconds without a message after which the node's worker may end.
    """
    record: dict[str, Any] = {"session": session, "request": request, "seconds": seconds, "idle": idle}
    return RecordDict({_ROUND: ConfigRecord(record)})


def read_round(message: Message) -> dict[str, Any]:
    """Reads a round's message; the keys are the arguments of ``round_content``."""
    return dict(message.content.config_records[_ROUND])


def answer_content(answer: bytes | None, seconds: float) -> RecordDict:
    """Makes the content of a node's answer to a round's message.

    Args:
        answer: encoded answer (see ``fed.messages``); None if the node was restarted and no longer has the run.
        seconds: time that the worker took.
    """
    return RecordDict(
        {_ROUND: ConfigRecord({"known": answer is not None, "answer": answer or b"", "seconds": seconds})}
    )


def read_answer(message: Message) -> tuple[bytes | None, float]:
    """Reads a node's answer: the arguments of ``answer_content``."""
    record = message.content.config_records[_ROUND]
    answer = record["answer"]
    if not isinstance(answer, bytes):
        raise TypeError(f"the answer is of type {type(answer).__name__}, not bytes")
    return (answer if record["known"] else None), float(str(record["seconds"]))


def node_content(client: int) -> RecordDict:
    """Makes the content of a node's answer to a registration: the id of its client."""
    return RecordDict({_NODE: ConfigRecord({"client": client})})


def read_client(message: Message) -> int:
    """Reads the client id in a node's answer to a registration."""
    return int(str(message.content.config_records[_NODE]["client"]))


def error_reply(text: str, message: Message) -> Message:
    """Makes the reply that reports to the server why a message failed."""
    return Message(Error(code=_CLIENT_APP_RAISED, reason=text), reply_to=message)


__all__ = [
    "REGISTRATION",
    "RELEASE",
    "ROUND",
    "RunDescription",
    "answer_content",
    "error_reply",
    "node_content",
    "read_answer",
    "read_client",
    "read_round",
    "round_content",
]
