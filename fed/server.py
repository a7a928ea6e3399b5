"""The server: asks clients for a round, checks what they answer, aggregates, writes the ledger, moves on."""

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..engine import stream
from ..engine.errors import MeerkatError
from .aggregation import Aggregation, aggregate, client_weights, in_order, mean_masters
from .gradip import GradIP, Trace
from .ledger.file import LedgerWriter, RoundRecord
from .messages import Stale, TrainReply, TrainRequest, decode_answer
from .privacy import largest_epsilon
from .rejection import RejectedError, Rejection
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

    line: RoundRecord
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
        self._asked = dict.fromkeys(self._clients, 0)  # steps of each client so far, those of the calibration too
        self._at = dict.fromkeys(self._clients, 1)  # round that each client is known to stand at
        self._history = array("f")  # the aggregated scalars of all rounds so far
        self._open_round()
        self._sampled: tuple[int, frozenset[int]] | None = None  # round -> who takes part

    def _open_round(self) -> None:
        # What clients sent, fp32, as bytes: of a hundred thousand objects Python's collector would walk each.
        self._sent: dict[int, bytes] = {}
        self._losses: dict[int, float] = {}
        self._steps = self._bytes_up = self._bytes_down = 0
        self._max = self._max_values()
        self._rejected_before = Counter(self.rejected)
        self._claimed_before = frozenset(self.claimed)

    @property
    def round(self) -> int:
        """The round that is under way, from 1; 0 during the calibration."""
        return CALIBRATION if self._calibrating else self.replica.round

    def participants(self) -> list[int]:
        """Ids of the clients that take part in this round, ascending; all of them in the calibration."""
        return sorted(self._sampled_clients())

    def _sampled_clients(self) -> frozenset[int]:
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

        It may be asked for again: for a client that did not get it, or that answered ``Stale``.
        """
        none = np.empty(0, dtype=np.float32)
        calibrating = (CALIBRATION, none, None)  # from the base model
        first, scalars, masters = calibrating if self._calibrating else self.missed(self._at[client])
        message = TrainRequest(
            client=client,
            round=self.round,
            local_steps=self.local_steps(client),
            first_round=first,
            steps_before=self._asked[client],
            scalars=scalars,
            masters=masters,
        ).encode()
        self._bytes_down += len(message)
        return message

    def missed(self, first: int) -> tuple[int, np.ndarray | None, np.ndarray | None]:
        """What brings a replica from the beginning of some round to that of this one, in the smaller of the two forms.

        Args:
            first: the round, from 1.

        Returns:
            The round it begins at; the aggregated scalars from there on, float32; or else the masters, float32 [k].
        """
        terms = self.replica.terms
        by_weights = terms.sends_weights and self.round > first
        if by_weights or (self.round - first) * terms.values > terms.elements:
            return self.round, None, self.replica.optimizer.weights.masters().cpu().numpy()
        return first, np.array(self._history[(first - 1) * terms.values :], dtype=np.float32), None

    def receive(self, message: bytes, sender: int | None = None) -> TrainReply:
        """Takes a client's answer into this round.

        Args:
            message: any bytes.
            sender: id of the client that the transport knows them to be from; None where it knows no names, and
                whom the message itself claims has to do.

        Raises:
            MessageError: saying why it is refused, a ``RejectedError``. It is counted in ``rejected``, nothing else
                changes, and the round goes on without it. A client that stands at an earlier round is refused too,
                as ``Rejection.BEHIND``; a request that is made for it then begins there.
        """
        self._bytes_up += len(message)
        try:
            reply = decode_answer(message, self._max)
            self._check_sender(reply, sender)
            if isinstance(reply, Stale):
                self._at[reply.client] = min(reply.at_round, self._at[reply.client])
                text = f"client {reply.client} stands at round {reply.at_round}"
                raise RejectedError(Rejection.STALE, text, reply.client)
            self._check(reply)
        except RejectedError as error:
            who = error.client if sender is None else sender
            self.rejected[f"{f'client {who}' if who in self._at else 'unknown'}: {error.rejection}"] += 1
            raise
        values = reply.masters if reply.scalars is None else reply.scalars
        assert values is not None
        self._sent[reply.client] = values.tobytes()
        self._steps += reply.local_steps
        if reply.loss is not None:
            self._losses[reply.client] = reply.loss
        self._at[reply.client] = max(self.round, 1)
        self.claimed[reply.client] = reply.examples
        return reply

    def rejected_this_round(self) -> dict[str, int]:
        """Messages refused since the last round was finished, by client and kind of reason, in their order."""
        return dict(sorted((self.rejected - self._rejected_before).items()))

    def _max_values(self) -> int:
        terms = self.replica.terms
        by_weights = terms.sends_weights
        return terms.elements if by_weights else 2 * terms.steps(self.round) * terms.queries  # and their positions

    def _check_sender(self, reply: TrainReply | Stale, sender: int | None) -> None:
        """Raises ``RejectedError`` unless whoever speaks has a say, now."""
        if sender is not None and sender != reply.client:
            text = f"client {sender} speaks for client {reply.client}"
            raise RejectedError(Rejection.IMPOSTOR, text, reply.client)
        if reply.client not in self._at:
            raise _refused(reply, Rejection.UNKNOWN, "is unknown")
        round = self.round
        if reply.round != round:
            raise _refused(reply, Rejection.ROUND, f"answers round {reply.round}; round {round} is under way")
        if reply.client in self._sent:
            raise _refused(reply, Rejection.REPEATED, f"has answered round {round} already")
        if reply.client not in self._sampled_clients():
            raise _refused(reply, Rejection.NOT_SAMPLED, f"does not take part in round {round}")

    def _check(self, reply: TrainReply) -> None:
        """Raises ``RejectedError`` unless an answer is what was asked for."""
        terms, steps, examples = self.replica.terms, self.local_steps(reply.client), reply.examples
        if reply.local_steps != steps:
            raise _refused(reply, Rejection.COUNT, f"took {reply.local_steps} steps instead of {steps}")
        if terms.sends_weights:
            sent, what, wanted = reply.masters, "master values", terms.elements
        else:
            sent, what, wanted = reply.scalars, "scalars", steps * terms.queries
        if sent is None:
            raise _refused(reply, Rejection.COUNT, f"sent no {what}, which {terms.gradient} steps are made of")
        if len(sent) != wanted:
            raise _refused(reply, Rejection.COUNT, f"sent {len(sent)} {what} instead of {wanted}")
        if reply.scalars is not None and len(sent):
            largest = float(np.fmax.reduce(np.abs(sent)))
            if largest > self._max_scalar:
                text = f"sent a scalar of size {largest:g}, above {self._max_scalar:g}"
                raise _refused(reply, Rejection.TOO_LARGE, text)
        if examples == 0:
            raise _refused(reply, Rejection.EXAMPLES, "has no examples")
        if 0 < self._max_examples < examples:
            text = f"claims {examples} examples, above the {self._max_examples} allowed"
            raise _refused(reply, Rejection.EXAMPLES, text)
        if examples != self.claimed.get(reply.client, examples):
            text = f"claims {examples} examples after {self.claimed[reply.client]} before"
            raise _refused(reply, Rejection.EXAMPLES, text)

    def finish_round(self) -> RoundResult:
        """Aggregates the answers, writes the round to the ledger, and moves the model on.

        Raises:
            RoundFailedError: if there was no usable answer; the round stays open.
        """
        if not self._sent:
            raise RoundFailedError(f"round {self.round}: no client gave a usable answer ({self.rejected_this_round()})")
        by_weights = self.replica.terms.sends_weights
        own = ClientScalars.of_bytes({} if by_weights else self._sent)
        traces = self._traces(self.round, own)
        line = self._line(own, traces)
        if self._ledger is not None:
            self._ledger.append(line)
        self._advance(line)
        return RoundResult(line=line, traces=traces)

    def restore(self, line: RoundRecord, *, weights: bool = True, traced: bool = True) -> RoundResult:
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
        self._advance(line, weights=weights)
        return RoundResult(line=line, traces=traces)

    def _traces(self, round: int, scalars: Mapping[int, Sequence[float]]) -> Mapping[int, Trace]:
        if self._gradip is None or not scalars:
            return {}
        return self._gradip.traces(self.replica.terms.seeds(round), scalars)

    def _line(self, own: ClientScalars, traces: Mapping[int, Trace]) -> RoundRecord:
        """The round as the ledger keeps it."""
        terms, number = self.replica.terms, self.round
        weights = client_weights({i: self.claimed[i] for i in self._sent}, self._aggregation.weighting)
        scalars: list[float] = []
        selection = Selection()
        masters = None
        if self._calibrating:
            assert self._select is not None
            selection = self._select(traces)
        elif terms.sends_weights:
            masters = mean_masters({i: np.frombuffer(own, dtype=np.float32) for i, own in self._sent.items()}, weights)
        else:
            scalars = aggregate(own, weights, terms.values, self._aggregation)
        return RoundRecord(
            round=number,
            lr=terms.learning_rates(number),
            scalars=scalars,
            clients=own,
            examples={i: self.claimed[i] for i in sorted(self.claimed.keys() - self._claimed_before)},
            loss=self._loss(),
            steps=self._steps,
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            rejected=self.rejected_this_round(),
            epsilon=self._epsilon(),
            stopped=selection.stopped,
            thresholds=selection.thresholds,
            masters=masters,
        )

    def _loss(self) -> float | None:
        """Mean training loss of the clients that told one, weighted by ``p_i``; None if none did."""
        told = self._losses
        shares = client_weights({i: self.claimed[i] for i in told}, self._aggregation.weighting)
        return float(in_order(np.array([share * told[i] for i, share in shares.items()]))) if told else None

    def _epsilon(self) -> float | None:
        """What the client that is protected least will have spent after this round."""
        terms = self.replica.terms
        if terms.privacy is None:
            return None
        asked = self._asked | {i: self._asked[i] + self.local_steps(i) for i in self._sampled_clients()}
        spent = {(self.claimed[i], steps) for i, steps in asked.items() if i in self.claimed}
        return largest_epsilon(terms.privacy, spent, terms.queries)

    def _advance(self, line: RoundRecord, *, weights: bool = True) -> None:
        for i in self._sampled_clients():
            self._asked[i] += self.local_steps(i)
        if self._calibrating:
            self.stopped, self._calibrating = frozenset(line.stopped), False
        else:
            self._history.extend(line.scalars)
            if not weights:
                self.replica.round += 1
            elif line.masters is not None:
                self.replica.load_masters(line.round + 1, line.masters)
            else:
                self.replica.apply_rounds([line.scalars])
        self._open_round()


def _refused(reply: TrainReply | Stale, rejection: Rejection, text: str) -> RejectedError:
    return RejectedError(rejection, f"client {reply.client} {text}", reply.client)


__all__ = ["RoundFailedError", "RoundResult", "Select", "Server"]
