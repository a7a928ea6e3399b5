"""Why a message is refused: a fixed set of reasons, so that nobody can grow a server's books with ever new ones."""

from enum import StrEnum

from ..engine.errors import MessageError


class Rejection(StrEnum):
    """The kinds of reasons for which a message is refused."""

    MALFORMED = "malformed"
    NOT_FINITE = "a value that is not finite"
    TOO_LARGE = "a scalar too large"
    COUNT = "wrong count of steps or values"
    UNKNOWN = "unknown client"
    IMPOSTOR = "speaks for another client"
    ROUND = "another round"
    REPEATED = "a second answer"
    NOT_SAMPLED = "not sampled"
    STALE = "stands at an earlier round"
    EXAMPLES = "unfit number of examples"


class RejectedError(MessageError):
    """A message that is refused.

    Args:
        rejection: the kind of reason.
        text: the reason in full.
        client: whom the message claims to be from or for, where it is whole enough to say so; else None.
    """

    def __init__(self, rejection: Rejection, text: str, client: int | None = None) -> None:
        super().__init__(text)
        self.rejection, self.client = rejection, client


__all__ = ["RejectedError", "Rejection"]
