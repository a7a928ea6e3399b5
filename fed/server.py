"""The server: asks clients for a round, checks what they answer, aggregates, writes the ledger, moves on."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..errors import MeerkatError, MessageError
from .aggregation import Weighting, client_weights, weighted_mean
from .ledger import LedgerWriter, Round
from .messages import TrainReply, TrainRequest
from .replica import Replica


class RoundFailedError(MeerkatError, RuntimeError):
    """No client gave a usable answer in a round."""


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What a round came to.

    Args:
        round: from 1.
        loss: mean training loss of the clients, weighted by ``p_i``.
        scalars: aggregated, fp32, [T].
        steps: local steps that the clients took in all.
        rejected: messages refused in this round.
    """

    round: int
    loss: float
    scalars: list[float]
    steps: int
    rejected: int


class Server:
    """The server of a federation.

    Args:
        clients: ids of the clients.
        replica: the server's model at the beginning of round 1.
        ledger: an open ledger, or None to keep none.
        weighting: how ``p_i`` are made.
        local_steps: steps of the clients that take fewer than ``T``; the others take ``T``.
    """

    def __init__(
        self,
        clients: list[int],
        replica: Replica,
        ledger: LedgerWriter | None,
        weighting: Weighting,
        local_steps: dict[int, int] | None = None,
    ) -> None:
        self.replica = replica
        self.rejected: Counter[str] = Counter()  # reason -> messages refused
        self._ledger = ledger
        self._weighting = weighting
        self._local_steps = dict.fromkeys(sorted(clients), replica.terms.local_steps) | (local_steps or {})
        self._at = dict.fromkeys(self._local_steps, 1)  # round that each client is known to stand at
        self._history: list[list[float]] = []
        self._rejected_before = 0
        self._replies: dict[int, TrainReply] = {}

    @property
    def round(self) -> int:
        """The round that is under way, from 1."""
        return self.replica.round

    def request(self, client: int) -> bytes:
        """The request to one client for this round: what it missed, in the smaller of the two forms."""
        first, steps = self._at[client], self.replica.terms.local_steps
        if (self.round - first) * steps <= self.replica.terms.elements:
            missed = np.array(self._history[first - 1 :], dtype=np.float32).reshape(-1)
            message = TrainRequest(
                client=client,
                round=self.round,
                local_steps=self._local_steps[client],
                first_round=first,
                scalars=missed,
            )
        else:
            message = TrainRequest(
                client=client,
                round=self.round,
                local_steps=self._local_steps[client],
                first_round=self.round,
                masters=self.replica.optimizer.weights.masters().cpu().numpy(),
            )
        return message.encode()

    def receive(self, message: bytes) -> TrainReply:
        """Takes a client's answer into this round.

        Raises:
            MessageError: saying why it is refused; it is counted in ``rejected`` and the round goes on without it.
        """
        try:
            reply = TrainReply.decode(message)
            self._check(reply)
        except MessageError as error:
            self.rejected[str(error)] += 1
            raise
        self._replies[reply.client] = reply
        self._at[reply.client] = self.round
        return reply

    def _check(self, reply: TrainReply) -> None:
        who = f"client {reply.client}"
        if reply.client not in self._local_steps:
            raise MessageError(f"{who} is unknown")
        if reply.round != self.round:
            raise MessageError(f"{who} answers round {reply.round}; round {self.round} is under way")
        if reply.client in self._replies:
            raise MessageError(f"{who} has answered round {self.round} already")
        if len(reply.scalars) != self._local_steps[reply.client]:
            raise MessageError(f"{who} sent {len(reply.scalars)} scalars instead of {self._local_steps[reply.client]}")
        if reply.examples == 0:
            raise MessageError(f"{who} has no examples")

    def finish_round(self) -> RoundResult:
        """Aggregates the answers, writes the round to the ledger, and moves the model on.

        Raises:
            RoundFailedError: if there was no usable answer; the round stays open.
        """
        if not self._replies:
            raise RoundFailedError(f"round {self.round}: no client gave a usable answer ({dict(self.rejected)})")
        weights = client_weights({i: reply.examples for i, reply in self._replies.items()}, self._weighting)
        own = {i: self._replies[i].scalars.tolist() for i in weights}
        scalars = weighted_mean(own, weights, self.replica.terms.local_steps)
        line = Round(round=self.round, lr=self.replica.terms.learning_rates(self.round), scalars=scalars, clients=own)
        if self._ledger is not None:
            self._ledger.append(line)
        self.replica.apply_rounds([scalars])
        self._history.append(scalars)
        refused = self.rejected.total()
        result = RoundResult(
            round=line.round,
            loss=sum(weights[i] * self._replies[i].loss for i in weights),
            scalars=scalars,
            steps=sum(map(len, own.values())),
            rejected=refused - self._rejected_before,
        )
        self._rejected_before = refused
        self._replies = {}
        return result


__all__ = ["RoundFailedError", "RoundResult", "Server"]
