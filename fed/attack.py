"""Simulated hostile clients, to measure robustness: they alter the scalars of an honest client's replies."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from .client import Client
from .exchange import ClientLike
from .messages import Stale, decode_answer


class Attack(StrEnum):
    """Attack that a hostile client makes with its scalars."""

    NONE = "none"
    SIGN_FLIP = "sign-flip"
    SCALE = "scale"


_FACTORS = {Attack.SIGN_FLIP: np.float32(-1), Attack.SCALE: np.float32(1e6)}


@dataclass(frozen=True)
class HostileClient:
    """A client that sends an honest client's replies with altered scalars.

    Args:
        honest: the honest client, which must reply with scalars.
        attack: the attack; not ``Attack.NONE``.
    """

    honest: Client
    attack: Attack

    @property
    def id(self) -> int:
        """Id of the honest client."""
        return self.honest.id

    def handle(self, message: bytes) -> bytes:
        """Answers a request; raises the same errors as the honest client."""
        reply = decode_answer(self.honest.handle(message))
        if isinstance(reply, Stale):
            return reply.encode()
        assert reply.scalars is not None
        return replace(reply, scalars=reply.scalars * _FACTORS[self.attack]).encode()


def with_attackers(clients: Sequence[Client], attack: Attack, attackers: int) -> list[ClientLike]:
    """Makes the last clients hostile.

    Args:
        clients: honest clients.
        attack: the attack.
        attackers: number of hostile clients.

    Returns:
        All clients, in the same order.
    """
    first = len(clients) - attackers
    return [*clients[:first], *(HostileClient(client, attack) for client in clients[first:])]


def attack_summary(attack: Attack, clients: int, attackers: int) -> dict[str, Any]:
    """Fields of a run's summary: the attack and the ids of the hostile clients; empty if there are none."""
    return {"attack": attack, "attackers": list(range(clients - attackers, clients))} if attackers else {}


__all__ = ["Attack", "HostileClient", "attack_summary", "with_attackers"]
