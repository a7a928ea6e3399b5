"""Reasons for which a message is rejected: a fixed set, so that no sender can make the server's counters grow."""

from enum import StrEnum

from ..engine.errors import MessageError


class Rejection(StrEnum):
    """Reason for which a message is rejected. The values are written to ledgers."""

    MALFORMED = "malformed"
    NOT_FINITE = "a value that is not finite"
    TOO_LARGE = "a scalar too large"
    COUNT = "wrong number of steps or values"
    UNKNOWN = "unknown client"
    IMPOSTOR = "sent in another client's name"
    ROUND = "another round"
    REPEATED = "a second answer"
    NOT_SAMPLED = "not sampled"
    STALE = "is at an earlier round"
    EXAMPLES = "implausible number of examples"


class RejectedError(MessageError):
    """A message is rejected.

    Args:
        rejection: the reason.
        text: the reason in detail, for people.
        client: id in the message of the client that it is from or for; None if the message is too damaged to have one.
    """

    def __init__(self, rejection: Rejection, text: str, client: int | None = None) -> None:
        super().__init__(text)
        self.rejection, self.client = rejection, client


__all__ = ["RejectedError", "Rejection"]
