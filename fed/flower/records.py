"""What ServerApp and ClientApp put into Flower's messages, and how it is read again."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

# Message types: who are you, this is the run; a request of the rounds; the run is over.
INTRODUCTION = "query.meerkat"
ROUND = "train.meerkat"
DISMISSAL = "query.meerkat_end"
# Flower's code for a ClientApp that raised, which is what an error of ours is to it.
_RAISED = 2
_SETUP, _MASK, _ROUND, _NODE = "meerkat-setup", "meerkat-mask", "meerkat-round", "meerkat-node"


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """What a node has to know of a run before its first round.

    Args:
        settings: TOML, less what is the server's own business.
        base: fingerprint of the base model.
        mask_digest: of the mask.
        mask: its file; empty if the node has it, or makes it itself.
        seconds: how long a node may take over it.
    """

    settings: str
    base: str
    mask_digest: str
    mask: bytes
    seconds: float

    @property
    def session(self) -> str:
        """What tells this setup from others."""
        return sha256("\n".join((self.settings, self.base, self.mask_digest)).encode()).hexdigest()

    def content(self) -> RecordDict:
        """As records; the mask is an array, which Flower sends in pieces."""
        plain: dict[str, Any] = {
            "settings": self.settings,
            "base": self.base,
            "mask": self.mask_digest,
            "seconds": self.seconds,
        }
        array = np.frombuffer(self.mask, dtype=np.uint8)
        return RecordDict({_SETUP: ConfigRecord(plain), _MASK: ArrayRecord({"file": Array(array)})})

    @classmethod
    def of(cls, content: RecordDict) -> "RunDescription | None":
        """Out of a message or a node's state; None if there is none in it."""
        if _SETUP not in content.config_records or _MASK not in content.array_records:
            return None
        plain = content.config_records[_SETUP]
        return cls(
            settings=str(plain["settings"]),
            base=str(plain["base"]),
            mask_digest=str(plain["mask"]),
            seconds=float(str(plain["seconds"])),
            mask=content.array_records[_MASK]["file"].numpy().tobytes(),
        )


def round_content(session: str, request: bytes, seconds: float, idle: float) -> RecordDict:
    """A request to a client.

    Args:
        session: of the setup it belongs to.
        request: the message of ``fed.messages``.
        seconds: how long the answer is waited for.
        idle: after how many seconds without a message the node's worker may end.
    """
    record: dict[str, Any] = {"session": session, "request": request, "seconds": seconds, "idle": idle}
    return RecordDict({_ROUND: ConfigRecord(record)})


def round_of(message: Message) -> dict[str, Any]:
    """What ``round_content`` was given."""
    return dict(message.content.config_records[_ROUND])


def answer_content(answer: bytes | None, seconds: float) -> RecordDict:
    """The answer to a request; None if the node does not know the run, having been started anew.

    Args:
        answer: the message of ``fed.messages``, or None.
        seconds: that the worker took.
    """
    return RecordDict(
        {_ROUND: ConfigRecord({"known": answer is not None, "answer": answer or b"", "seconds": seconds})}
    )


def answer_of(message: Message) -> tuple[bytes | None, float]:
    """What ``answer_content`` was given."""
    record = message.content.config_records[_ROUND]
    answer = record["answer"]
    if not isinstance(answer, bytes):
        raise TypeError(f"the answer is of type {type(answer).__name__}")
    return (answer if record["known"] else None), float(str(record["seconds"]))


def node_content(client: int) -> RecordDict:
    """A node says which client it is."""
    return RecordDict({_NODE: ConfigRecord({"client": client})})


def client_of(message: Message) -> int:
    """What ``node_content`` was given."""
    return int(str(message.content.config_records[_NODE]["client"]))


def failure(text: str, message: Message) -> Message:
    """Tells the server that a message could not be dealt with."""
    return Message(Error(code=_RAISED, reason=text), reply_to=message)


__all__ = [
    "DISMISSAL",
    "INTRODUCTION",
    "ROUND",
    "RunDescription",
    "answer_content",
    "answer_of",
    "client_of",
    "failure",
    "node_content",
    "round_content",
    "round_of",
]
