"""Hostile clients, to measure with: each alters the scalars of an honest client's reply before they are sent."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from .client import Client
from .exchange import ClientLike
from .messages import Stale, decode_answer


class Attack(StrEnum):
    """What a hostile client does to its scalars."""

    NONE = "none"
    SIGN_FLIP = "sign-flip"
    SCALE = "scale"


_FACTORS = {Attack.SIGN_FLIP: np.float32(-1), Attack.SCALE: np.float32(1e6)}


@dataclass(frozen=True)
class HostileClient:
    """Answers as its honest client does, but for the scalars.

    Args:
        honest: one that answers with scalars.
        attack: any but none.
    """

    honest: Client
    attack: Attack

    @property
    def id(self) -> int:
        """The honest client's."""
        return self.honest.id

    def handle(self, message: bytes) -> bytes:
        """Answers as the honest client does; raises what it raises."""
        reply = decode_answer(self.honest.handle(message))
        if isinstance(reply, Stale):
            return reply.encode()
        assert reply.scalars is not None
        return replace(reply, scalars=reply.scalars * _FACTORS[self.attack]).encode()


def with_attackers(clients: Sequence[Client], attack: Attack, attackers: int) -> list[ClientLike]:
    """The clients, the last ``attackers`` of them hostile."""
    first = len(clients) - attackers
    return [*clients[:first], *(HostileClient(client, attack) for client in clients[first:])]


def attack_summary(attack: Attack, clients: int, attackers: int) -> dict[str, Any]:
    """What a run's summary says of an attack: nothing, or which it was and the ids of those who made it."""
    return {"attack": attack, "attackers": list(range(clients - attackers, clients))} if attackers else {}


__all__ = ["Attack", "HostileClient", "attack_summary", "with_attackers"]
