"""The server of a federation: requests, checks and aggregates the clients' answers, and writes the ledger."""

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..engine import stream
from ..engine.errors import MeerkatError
from .aggregation import Aggregation, aggregate, client_weights, mean_masters, sum_in_order
from .gradip import GradIP, Trace
from .ledger.file import LedgerWriter, RoundRecord
from .messages import Stale, TrainReply, TrainRequest, decode_answer
from .privacy import largest_epsilon
from .rejection import RejectedError, Rejection
from .replica import Replica
from .scalars import ClientScalars
from .selection import Selection
from .terms import CALIBRATION

# Selects the clients to stop early from the calibration paths of all clients (client id -> path).
SelectionRule = Callable[[Mapping[int, Trace]], Selection]


class RoundFailedError(MeerkatError, RuntimeError):
    """No client sent a usable answer in a round."""


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """Result of a finished round.

    Args:
        record: the round's line in the ledger.
        traces: each client's path, reconstructed from its scalars; empty without GradIP.
    """

    record: RoundRecord
    traces: Mapping[int, Trace] = field(default_factory=dict)


class Server:
    """The server of a federation.

    It starts with the calibration (round 0) if the terms have one, and with round 1 otherwise.

    Args:
        clients: ids of the clients.
        replica: the server's model at the beginning of round 1.
        ledger: an open ledger, or None to keep none.
        aggregation: the aggregation rule and its settings.
        per_round: number of clients that take part in a round, sampled for each round; None: all clients.
        gradip: reconstructs the clients' paths; None: paths are not recorded.
        select: selects the clients to stop early from the calibration paths; required if the terms have a calibration.
        stopped: ids of clients that are stopped early from the first round on.
        max_scalar: absolute value above which a scalar is rejected. The default is far above realistic values: at eps
            1e-3, a scalar of 1e8 needs losses that differ by 2e5.
        max_examples: number of examples above which a reply is rejected; 0: no limit. A client's first claim is
            binding, but the server cannot verify it. With the mean weighted by examples, a client that claims many
            examples gets a large weight. To prevent this, set this limit, use uniform weighting, or use another rule.

    Attributes:
        replica: the server's model, at the beginning of the current round.
        rejected: number of rejected messages by client and reason. The number of keys is bounded: at most the number
            of clients (and "unknown") times the number of reasons.
        claimed_examples: number of examples that each client reported.
        stopped: ids of the clients that take one step a round.

    Raises:
        ValueError: if the terms have a calibration and ``gradip`` or ``select`` is missing.
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
        select: SelectionRule | None = None,
        stopped: Sequence[int] = (),
        max_scalar: float = 1e8,
        max_examples: int = 0,
    ) -> None:
        if replica.terms.calibration_steps and (gradip is None or select is None):
            raise ValueError("a federation with a calibration needs both gradip and select, a rule to select clients")
        self.replica = replica
        self.rejected: Counter[str] = Counter()
        self.claimed_examples: dict[int, int] = {}
        self.stopped = frozenset(stopped)
        self._clients = sorted(clients)
        self._ledger, self._aggregation, self._per_round = ledger, aggregation, per_round
        self._max_scalar, self._max_examples = max_scalar, max_examples
        self._gradip, self._select = gradip, select
        self._calibrating = replica.terms.calibration_steps > 0
        # By client: local steps requested so far (calibration included), and the round its replica is at.
        self._steps_requested = dict.fromkeys(self._clients, 0)
        self._client_round = dict.fromkeys(self._clients, 1)
        self._history = array("f")  # the aggregated scalars of all rounds so far
        self._open_round()
        self._sampled: tuple[int, frozenset[int]] | None = None  # (round, ids of its participants)

    def _open_round(self) -> None:
        # The clients' fp32 values, kept as bytes: Python's garbage collector would walk a hundred thousand arrays.
        self._answers: dict[int, bytes] = {}
        self._losses: dict[int, float] = {}
        self._steps = self._bytes_up = self._bytes_down = 0
        self._max_values = self._max_values_of_reply()
        self._rejected_before = Counter(self.rejected)
        self._claimed_before = frozenset(self.claimed_examples)

    @property
    def round(self) -> int:
        """The current round, from 1; 0 during the calibration."""
        return CALIBRATION if self._calibrating else self.replica.round

    def participants(self) -> list[int]:
        """Ids of the clients that take part in the current round, ascending; all clients in the calibration."""
        return sorted(self._sampled_clients())

    def _sampled_clients(self) -> frozenset[int]:
        if self._sampled is None or self._sampled[0] != self.round:
            sampled, root = self._clients, self.replica.terms.seed
            if not self._calibrating and self._per_round is not None:
                order = stream.permutation(stream.derived_seed(root, "samp", self.round), len(sampled))
                sampled = [sampled[i] for i in order[: self._per_round].tolist()]
            self._sampled = self.round, frozenset(sampled)
        return self._sampled[1]

    def local_steps(self, client: int) -> int:
        """Number of local steps that a client takes in the current round."""
        return 1 if client in self.stopped else self.replica.terms.steps(self.round)

    def request(self, client: int) -> bytes:
        """Makes the request to one client for the current round.

        It contains the rounds that the client missed, as scalars or as masters, whichever is smaller. It may be called
        again in the same round, for a client that did not receive the first request or that answered ``Stale``.

        Returns:
            An encoded ``TrainRequest``.
        """
        scalars: np.ndarray | None
        masters: np.ndarray | None
        if self._calibrating:  # the path starts from the base model: nothing to catch up
            first, scalars, masters = CALIBRATION, np.empty(0, dtype=np.float32), None
        else:
            first, scalars, masters = self.missed_update(self._client_round[client])
        message = TrainRequest(
            client=client,
            round=self.round,
            local_steps=self.local_steps(client),
            first_round=first,
            steps_before=self._steps_requested[client],
            scalars=scalars,
            masters=masters,
        ).encode()
        self._bytes_down += len(message)
        return message

    def missed_update(self, first: int) -> tuple[int, np.ndarray | None, np.ndarray | None]:
        """Returns the update that brings a replica from the beginning of a round to the current one.

        The update is the aggregated scalars or the master values, whichever is smaller.

        Args:
            first: the replica's round, from 1.

        Returns:
            Three values: the round at which the update begins; the aggregated scalars of the rounds from there on,
            float32, or None; the masters, float32 [k], or None. Either the scalars or the masters are None.
        """
        terms = self.replica.terms
        by_weights = terms.sends_weights and self.round > first
        if by_weights or (self.round - first) * terms.scalars_per_round > terms.elements:
            return self.round, None, self.replica.optimizer.weights.masters().cpu().numpy()
        return first, np.array(self._history[(first - 1) * terms.scalars_per_round :], dtype=np.float32), None

    def receive(self, message: bytes, sender: int | None = None) -> TrainReply:
        """Checks a client's answer and adds it to the current round.

        Args:
            message: any bytes.
            sender: id of the client that sent them, as authenticated by the transport. None: the transport does not
                authenticate senders, and the id in the message is trusted.

        Returns:
            The accepted reply.

        Raises:
            MessageError: if the message is rejected; the error is a ``RejectedError`` with the reason. The rejection is
                counted in ``rejected``, its bytes in the round's ``bytes_up``, and the round continues without the
                message. A stale client's answer is rejected too (``Rejection.STALE``); the next request to that client
                contains all the rounds it missed.
        """
        self._bytes_up += len(message)
        try:
            answer = decode_answer(message, self._max_values)
            self._check_sender(answer, sender)
            if isinstance(answer, Stale):
                self._client_round[answer.client] = min(answer.at_round, self._client_round[answer.client])
                raise answer.as_error()
            self._check_reply(answer)
        except RejectedError as error:
            client = error.client if sender is None else sender
            name = f"client {client}" if client in self._client_round else "unknown"
            self.rejected[f"{name}: {error.rejection}"] += 1
            raise
        values = answer.masters if answer.scalars is None else answer.scalars
        assert values is not None
        self._answers[answer.client] = values.tobytes()
        self._steps += answer.local_steps
        if answer.loss is not None:
            self._losses[answer.client] = answer.loss
        self._client_round[answer.client] = max(self.round, 1)
        self.claimed_examples[answer.client] = answer.examples
        return answer

    def rejected_this_round(self) -> dict[str, int]:
        """Number of messages rejected since the last round was finished, by client and reason, sorted by key."""
        return dict(sorted((self.rejected - self._rejected_before).items()))

    def _max_values_of_reply(self) -> int:
        terms = self.replica.terms
        if terms.sends_weights:
            return terms.elements
        return 2 * terms.steps(self.round) * terms.queries  # all scalars, and the positions of the skipped ones

    def _check_sender(self, answer: TrainReply | Stale, sender: int | None) -> None:
        """Raises ``RejectedError`` unless the sender may answer this round now."""
        if sender is not None and sender != answer.client:
            text = f"client {sender} sent a message in the name of client {answer.client}"
            raise RejectedError(Rejection.IMPOSTOR, text, answer.client)
        if answer.client not in self._client_round:
            raise _rejected(answer, Rejection.UNKNOWN, "is not part of this federation")
        round = self.round
        if answer.round != round:
            raise _rejected(answer, Rejection.ROUND, f"sent an answer for round {answer.round} in round {round}")
        if answer.client in self._answers:
            raise _rejected(answer, Rejection.REPEATED, f"has already answered round {round}")
        if answer.client not in self._sampled_clients():
            raise _rejected(answer, Rejection.NOT_SAMPLED, f"does not take part in round {round}")

    def _check_reply(self, reply: TrainReply) -> None:
        """Raises ``RejectedError`` unless a reply contains the requested values and a plausible number of examples."""
        terms, steps, examples = self.replica.terms, self.local_steps(reply.client), reply.examples
        if reply.local_steps != steps:
            text = f"sent a reply for {reply.local_steps} local steps, {steps} were requested"
            raise _rejected(reply, Rejection.COUNT, text)
        if terms.sends_weights:
            sent, noun, expected = reply.masters, "master values", terms.elements
        else:
            sent, noun, expected = reply.scalars, "scalars", steps * terms.queries
        if sent is None:
            text = f"sent no {noun}, {expected} were expected (gradient: {terms.gradient})"
            raise _rejected(reply, Rejection.COUNT, text)
        if len(sent) != expected:
            raise _rejected(reply, Rejection.COUNT, f"sent {len(sent)} {noun}, {expected} were expected")
        if reply.scalars is not None and len(sent):
            largest = float(np.fmax.reduce(np.abs(sent)))
            if largest > self._max_scalar:
                text = f"sent a scalar of absolute value {largest:g}, at most {self._max_scalar:g} is allowed"
                raise _rejected(reply, Rejection.TOO_LARGE, text)
        if examples == 0:
            raise _rejected(reply, Rejection.EXAMPLES, "reported 0 examples, at least 1 was expected")
        if 0 < self._max_examples < examples:
            text = f"reported {examples} examples, at most {self._max_examples} are allowed"
            raise _rejected(reply, Rejection.EXAMPLES, text)
        if examples != self.claimed_examples.get(reply.client, examples):
            text = f"reported {examples} examples, {self.claimed_examples[reply.client]} in an earlier round"
            raise _rejected(reply, Rejection.EXAMPLES, text)

    def finish_round(self) -> RoundResult:
        """Aggregates the answers, writes the round to the ledger, and updates the model.

        Raises:
            RoundFailedError: if no answer was accepted; the round stays open.
        """
        if not self._answers:
            raise RoundFailedError(
                f"round {self.round}: no client sent a usable answer (rejected messages: {self.rejected_this_round()})"
            )
        by_weights = self.replica.terms.sends_weights
        scalars = ClientScalars.from_bytes({} if by_weights else self._answers)
        traces = self._traces(self.round, scalars)
        record = self._make_record(scalars, traces)
        if self._ledger is not None:
            self._ledger.append(record)
        self._advance(record)
        return RoundResult(record=record, traces=traces)

    def restore(self, record: RoundRecord, *, update_model: bool = True, compute_traces: bool = True) -> RoundResult:
        """Applies the current round from a ledger, in place of requesting it from the clients.

        Args:
            record: the ledger's line of the current round.
            update_model: whether to update the model too; if False, the caller sets the masters.
            compute_traces: whether to compute the clients' paths; those of a calibration are always computed.

        Raises:
            ValueError: if the line is not of the current round.
        """
        if record.round != self.round:
            raise ValueError(f"the ledger line is of round {record.round}, the server is at round {self.round}")
        traces = self._traces(record.round, record.clients) if compute_traces or self._calibrating else {}
        self.rejected.update(record.rejected)
        self.claimed_examples |= record.examples
        self._client_round |= {i: max(record.round, 1) for i in record.clients if i in self._client_round}
        self._advance(record, update_model=update_model)
        return RoundResult(record=record, traces=traces)

    def _traces(self, round: int, scalars: Mapping[int, Sequence[float]]) -> Mapping[int, Trace]:
        if self._gradip is None or not scalars:
            return {}
        return self._gradip.traces(self.replica.terms.seeds(round), scalars)

    def _make_record(self, client_scalars: ClientScalars, traces: Mapping[int, Trace]) -> RoundRecord:
        """Aggregates the current round into its ledger line."""
        terms, number = self.replica.terms, self.round
        weights = client_weights({i: self.claimed_examples[i] for i in self._answers}, self._aggregation.weighting)
        scalars: list[float] = []
        selection = Selection()
        masters = None
        if self._calibrating:
            assert self._select is not None
            selection = self._select(traces)
        elif terms.sends_weights:
            client_masters = {i: np.frombuffer(data, dtype=np.float32) for i, data in self._answers.items()}
            masters = mean_masters(client_masters, weights)
        else:
            scalars = aggregate(client_scalars, weights, terms.scalars_per_round, self._aggregation)
        return RoundRecord(
            round=number,
            lr=terms.learning_rates(number),
            scalars=scalars,
            clients=client_scalars,
            examples={i: self.claimed_examples[i] for i in sorted(self.claimed_examples.keys() - self._claimed_before)},
            loss=self._mean_loss(),
            steps=self._steps,
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            rejected=self.rejected_this_round(),
            epsilon=self._epsilon(),
            stopped=selection.stopped,
            thresholds=selection.thresholds,
            masters=masters,
        )

    def _mean_loss(self) -> float | None:
        """Mean training loss of the clients that reported one, weighted by ``p_i``; None if no client did."""
        losses = self._losses
        if not losses:
            return None
        weights = client_weights({i: self.claimed_examples[i] for i in losses}, self._aggregation.weighting)
        return float(sum_in_order(np.array([p * losses[i] for i, p in weights.items()])))

    def _epsilon(self) -> float | None:
        """Largest epsilon that any client has spent after the current round; None without privacy."""
        terms = self.replica.terms
        if terms.privacy is None:
            return None
        this_round = {i: self._steps_requested[i] + self.local_steps(i) for i in self._sampled_clients()}
        requested = self._steps_requested | this_round
        spent = {(self.claimed_examples[i], steps) for i, steps in requested.items() if i in self.claimed_examples}
        return largest_epsilon(terms.privacy, spent, terms.queries)

    def _advance(self, record: RoundRecord, *, update_model: bool = True) -> None:
        """Moves the server from the current round to the next."""
        for i in self._sampled_clients():
            self._steps_requested[i] += self.local_steps(i)
        if self._calibrating:
            self.stopped, self._calibrating = frozenset(record.stopped), False
        else:
            self._history.extend(record.scalars)
            if not update_model:
                self.replica.round += 1
            elif record.masters is not None:
                self.replica.load_masters(record.round + 1, record.masters)
            else:
                self.replica.apply_rounds([record.scalars])
        self._open_round()


def _rejected(answer: TrainReply | Stale, rejection: Rejection, text: str) -> RejectedError:
    return RejectedError(rejection, f"client {answer.client} {text}", answer.client)


__all__ = ["RoundFailedError", "RoundResult", "SelectionRule", "Server"]
