"""The server: asks clients for a round, checks what they answer, aggregates, writes the ledger, moves on."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .. import stream
from ..errors import MeerkatError
from .aggregation import Aggregation, aggregate, client_weights, in_order, mean_masters
from .gradip import GradIP, Trace
from .ledger import LedgerWriter, Round
from .messages import Behind, TrainReply, TrainRequest, decode_answer
from .methods import Gradient
from .privacy import largest_epsilon
from .refusal import Refusal, RefusedError
from .replica import Replica
from .scalars import ClientScalars
from .selection import Selection
from .terms import CALIBRATION

# From the calibration paths of all clients to those that are to be stopped early.
Select = Callable[[Mapping[int, Trace]], Selection]


class RoundFailedError(MeerkatError, RuntimeError):
    """No client gave a usable answer in a round."""


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What a round came to.

    Args:
        line: as the ledger has it.
        traces: what the server saw of each client's path; empty without GradIP.
    """

    line: Round
    traces: Mapping[int, Trace] = field(default_factory=dict)


class Server:
    """The server of a federation.

    It begins with the calibration, round 0, where the terms have one, and with round 1 otherwise.

    Args:
        clients: ids of the clients.
        replica: the server's model at the beginning of round 1.
        ledger: an open ledger, or None to keep none.
        aggregation: how a round is made of the answers.
        per_round: clients that take part in a round, sampled anew each time; None is all of them.
        gradip: looks at the clients' paths, or None.
        select: who is stopped early, from the calibration paths; needed where the terms have a calibration.
        stopped: ids of clients that are stopped early from the beginning.
        max_scalar: size above which a scalar is refused; no sane loss differs by 2e5, which is 1e8 at eps 1e-3.
        max_examples: number of examples above which a claim is refused; 0 believes any. What a client claims first
            is binding, but no server can check it: with the mean weighted by examples, a client that claims much
            counts for much. Bound it here, or weight uniformly, or take another rule.

    Attributes:
        rejected: messages refused, by client and kind of reason; never more keys than these are.
        claimed: number of examples that each client has claimed.
    """

    def __init__(
        self,
        clients: list[int],
        replica: Replica,
        ledger: LedgerWriter | None,
        aggregation: Aggregation,
        *,
        per_round: int | None = None,
        gradip: GradIP | None = None,
        select: Select | None = None,
        stopped: Sequence[int] = (),
        max_scalar: float = 1e8,
        max_examples: int = 0,
    ) -> None:
        if replica.terms.calibration_steps and (gradip is None or select is None):
            raise ValueError("a federation with a calibration needs GradIP and a rule that selects clients by it")
        self.replica = replica
        self.rejected: Counter[str] = Counter()
        self.claimed: dict[int, int] = {}
        self.stopped = frozenset(stopped)
        self._clients = sorted(clients)
        self._ledger, self._aggregation, self._per_round = ledger, aggregation, per_round
        self._max_scalar, self._max_examples = max_scalar, max_examples
        self._gradip, self._select = gradip, select
        self._calibrating = replica.terms.calibration_steps > 0
        self._asked = Counter[int]()  # steps of each client so far, those of the calibration too
        self._at = dict.fromkeys(self._clients, 1)  # round that each client is known to stand at
        self._history: list[list[float]] = []
        self._open_round()
        self._sampled: tuple[int, frozenset[int]] | None = None  # round -> who takes part

    def _open_round(self) -> None:
        self._replies: dict[int, TrainReply] = {}
        self._bytes_up = self._bytes_down = 0
        self._rejected_before = Counter(self.rejected)
        self._claimed_before = frozenset(self.claimed)

    @property
    def round(self) -> int:
        """The round that is under way, from 1; 0 during the calibration."""
        return CALIBRATION if self._calibrating else self.replica.round

    def participants(self) -> list[int]:
        """Ids of the clients that take part in this round, ascending; all of them in the calibration."""
        return sorted(self._taking_part())

    def _taking_part(self) -> frozenset[int]:
        if self._sampled is None or self._sampled[0] != self.round:
            chosen, root = self._clients, self.replica.terms.seed
            if not self._calibrating and self._per_round is not None:
                order = stream.permutation(stream.derived_seed(root, "samp", self.round), len(chosen))
                chosen = [chosen[i] for i in order[: self._per_round].tolist()]
            self._sampled = self.round, frozenset(chosen)
        return self._sampled[1]

    def local_steps(self, client: int) -> int:
        """Steps that a client is to take in this round."""
        return 1 if client in self.stopped else self.replica.terms.steps(self.round)

    def request(self, client: int) -> bytes:
        """The request to one client for this round: what it missed, in the smaller of the two forms.

        It may be asked for again: for a client that did not get it, or that answered ``Behind``.
        """
        terms, first = self.replica.terms, self._at[client]
        masters, missed = None, np.empty(0, dtype=np.float32)
        by_weights = terms.gradient is Gradient.BACKPROPAGATION and self.round > first
        if self._calibrating:
            first = CALIBRATION
        elif by_weights or (self.round - first) * terms.values > terms.elements:
            first, masters = self.round, self.replica.optimizer.weights.masters().cpu().numpy()
        else:
            missed = np.array(self._history[first - 1 :], dtype=np.float32).reshape(-1)
        message = TrainRequest(
            client=client,
            round=self.round,
            local_steps=self.local_steps(client),
            first_round=first,
            steps_before=self._asked[client],
            scalars=missed if masters is None else None,
            masters=masters,
        ).encode()
        self._bytes_down += len(message)
        return message

    def receive(self, message: bytes, sender: int | None = None) -> TrainReply:
        """Takes a client's answer into this round.

        Args:
            message: any bytes.
            sender: id of the client that the transport knows them to be from; None where it knows no names, and
                whom the message itself claims has to do.

        Raises:
            MessageError: saying why it is refused, a ``RefusedError``. It is counted in ``rejected``, nothing else
                changes, and the round goes on without it. A client that stands at an earlier round is refused too,
                as ``Refusal.BEHIND``; a request that is made for it then begins there.
        """
        self._bytes_up += len(message)
        try:
            reply = decode_answer(message, self._most_values())
            self._check_sender(reply, sender)
            if isinstance(reply, Behind):
                self._at[reply.client] = min(reply.stands, self._at[reply.client])
                text = f"client {reply.client} stands at round {reply.stands}"
                raise RefusedError(Refusal.BEHIND, text, reply.client)
            self._check(reply)
        except RefusedError as error:
            who = error.client if sender is None else sender
            self.rejected[f"{f'client {who}' if who in self._at else 'unknown'}: {error.refusal}"] += 1
            raise
        self._replies[reply.client] = reply
        self._at[reply.client] = max(self.round, 1)
        self.claimed[reply.client] = reply.examples
        return reply

    def rejected_now(self) -> dict[str, int]:
        """Messages refused since the last round was finished, by client and kind of reason, in their order."""
        return dict(sorted((self.rejected - self._rejected_before).items()))

    def _most_values(self) -> int:
        terms = self.replica.terms
        by_weights = terms.gradient is Gradient.BACKPROPAGATION
        return terms.elements if by_weights else 2 * terms.steps(self.round) * terms.queries  # and their positions

    def _check_sender(self, reply: TrainReply | Behind, sender: int | None) -> None:
        """Raises ``RefusedError`` unless whoever speaks has a say, now."""
        who = f"client {reply.client}"

        def refused(refusal: Refusal, text: str) -> RefusedError:
            return RefusedError(refusal, text, reply.client)

        if sender is not None and sender != reply.client:
            raise refused(Refusal.IMPOSTOR, f"client {sender} speaks for {who}")
        if reply.client not in self._at:
            raise refused(Refusal.UNKNOWN, f"{who} is unknown")
        if reply.round != self.round:
            raise refused(Refusal.ROUND, f"{who} answers round {reply.round}; round {self.round} is under way")
        if reply.client in self._replies:
            raise refused(Refusal.REPEATED, f"{who} has answered round {self.round} already")
        if reply.client not in self._taking_part():
            raise refused(Refusal.NOT_SAMPLED, f"{who} does not take part in round {self.round}")

    def _check(self, reply: TrainReply) -> None:
        """Raises ``RefusedError`` unless an answer is what was asked for."""
        who = f"client {reply.client}"

        def refused(refusal: Refusal, text: str) -> RefusedError:
            return RefusedError(refusal, text, reply.client)

        terms, steps = self.replica.terms, self.local_steps(reply.client)
        if reply.local_steps != steps:
            raise refused(Refusal.COUNT, f"{who} took {reply.local_steps} steps instead of {steps}")
        if terms.gradient is Gradient.BACKPROPAGATION:
            sent, what, wanted = reply.masters, "master values", terms.elements
        else:
            sent, what, wanted = reply.scalars, "scalars", steps * terms.queries
        if sent is None:
            raise refused(Refusal.COUNT, f"{who} sent no {what}, which {terms.gradient} steps are made of")
        if len(sent) != wanted:
            raise refused(Refusal.COUNT, f"{who} sent {len(sent)} {what} instead of {wanted}")
        largest = 0.0 if reply.scalars is None else float(np.fmax.reduce(np.abs(reply.scalars), initial=0.0))
        if largest > self._max_scalar:
            raise refused(Refusal.TOO_LARGE, f"{who} sent a scalar of size {largest:g}, above {self._max_scalar:g}")
        if reply.examples == 0:
            raise refused(Refusal.EXAMPLES, f"{who} has no examples")
        if 0 < self._max_examples < reply.examples:
            raise refused(
                Refusal.EXAMPLES, f"{who} claims {reply.examples} examples, above the {self._max_examples} allowed"
            )
        if reply.examples != self.claimed.get(reply.client, reply.examples):
            raise refused(
                Refusal.EXAMPLES, f"{who} claims {reply.examples} examples after {self.claimed[reply.client]} before"
            )

    def finish_round(self) -> RoundResult:
        """Aggregates the answers, writes the round to the ledger, and moves the model on.

        Raises:
            RoundFailedError: if there was no usable answer; the round stays open.
        """
        if not self._replies:
            raise RoundFailedError(f"round {self.round}: no client gave a usable answer ({self.rejected_now()})")
        sent = {i: reply.scalars for i, reply in self._replies.items() if reply.scalars is not None}
        own = ClientScalars.of(sent)
        traces = self._traces(self.round, own)
        line = self._line(own, traces)
        if self._ledger is not None:
            self._ledger.append(line)
        self._move_on(line)
        return RoundResult(line=line, traces=traces)

    def restore(self, line: Round, *, weights: bool = True, traced: bool = True) -> RoundResult:
        """Takes over this round from a ledger instead of asking the clients for it.

        Args:
            line: of this round.
            weights: whether to move the model on too; without, the masters are left to whoever has them.
            traced: whether to look at the clients' paths; a calibration's are always looked at.
        """
        if line.round != self.round:
            raise ValueError(f"round {self.round} is under way, the line is of round {line.round}")
        traces = self._traces(line.round, line.clients) if traced or self._calibrating else {}
        self.rejected.update(line.rejected)
        self.claimed |= line.examples
        self._at |= {i: max(line.round, 1) for i in line.clients if i in self._at}
        self._move_on(line, weights=weights)
        return RoundResult(line=line, traces=traces)

    def _traces(self, round: int, scalars: Mapping[int, Sequence[float]]) -> Mapping[int, Trace]:
        if self._gradip is None or not scalars:
            return {}
        return self._gradip.traces(self.replica.terms.seeds(round), scalars)

    def _line(self, own: ClientScalars, traces: Mapping[int, Trace]) -> Round:
        """The round as the ledger keeps it."""
        terms, number = self.replica.terms, self.round
        weights = client_weights({i: reply.examples for i, reply in self._replies.items()}, self._aggregation.weighting)
        scalars: list[float] = []
        selection = Selection()
        masters = None
        if self._calibrating:
            assert self._select is not None
            selection = self._select(traces)
        elif terms.gradient is Gradient.BACKPROPAGATION:
            masters = mean_masters({i: reply.masters for i, reply in self._replies.items()}, weights)
        else:
            scalars = aggregate(own, weights, terms.values, self._aggregation)
        return Round(
            round=number,
            lr=terms.learning_rates(number),
            scalars=scalars,
            clients=own,
            examples={i: self.claimed[i] for i in sorted(self.claimed.keys() - self._claimed_before)},
            loss=self._loss(),
            steps=sum(reply.local_steps for reply in self._replies.values()),
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            rejected=self.rejected_now(),
            epsilon=self._epsilon(),
            stopped=selection.stopped,
            thresholds=selection.thresholds,
            masters=masters,
        )

    def _loss(self) -> float | None:
        """Mean training loss of the clients that told one, weighted by ``p_i``; None if none did."""
        told = {i: reply.loss for i, reply in self._replies.items() if reply.loss is not None}
        shares = client_weights({i: self._replies[i].examples for i in told}, self._aggregation.weighting)
        return float(in_order(np.array([share * told[i] for i, share in shares.items()]))) if told else None

    def _epsilon(self) -> float | None:
        """What the client that is protected least will have spent after this round."""
        terms = self.replica.terms
        if terms.privacy is None:
            return None
        asked = self._asked + Counter(self._steps_now())
        spent = {(self.claimed[i], steps) for i, steps in asked.items() if i in self.claimed}
        return largest_epsilon(terms.privacy, spent, terms.queries)

    def _steps_now(self) -> dict[int, int]:
        return {i: self.local_steps(i) for i in self._taking_part()}

    def _move_on(self, line: Round, *, weights: bool = True) -> None:
        self._asked.update(self._steps_now())
        if self._calibrating:
            self.stopped, self._calibrating = frozenset(line.stopped), False
        else:
            self._history.append(line.scalars)
            if not weights:
                self.replica.round += 1
            elif line.masters is not None:
                self.replica.jump(line.round + 1, line.masters)
            else:
                self.replica.apply_rounds([line.scalars])
        self._open_round()


__all__ = ["RoundFailedError", "RoundResult", "Select", "Server"]
