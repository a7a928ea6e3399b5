"""The server of a federation: requests, checks and aggregates the clients' answers, and writes the ledger."""

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..engine import stream
from ..engine.errors import MeerkatError
from .aggregation import Aggregation, aggregate, client_weights, mean_masters
from .answers import Answers
from .gradip import GradIP, Trace
from .ledger.file import LedgerWriter, RoundRecord
from .messages import Stale, TrainReply, TrainRequest, decode_answer
from .privacy import Releases
from .rejection import RejectedError, Rejection
from .replica import Replica
from .reply_checks import check_reply, rejection_error
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


@dataclass(frozen=True, kw_only=True)
class _FinishedRound:
    """A round that is finished, and what the server's state is after it.

    Args:
        result: its result.
        in_ledger: whether the ledger had the round before the server.
        update_model: whether the server updates the model; if False, the caller sets the masters.
        rejected: see ``Server``.
        steps_requested: local steps requested from each client so far.
    """

    result: RoundResult
    in_ledger: bool
    update_model: bool
    rejected: Counter[str]
    steps_requested: dict[int, int]


class Server:
    """The server of a federation.

    It starts with the calibration (round 0) if the terms have one, and with round 1 otherwise.

    Any method may be interrupted (Ctrl-C) and called again. An answer is then accepted or not, and a round is written
    to the ledger and applied to the model once.

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
        self._releases = Releases(replica.terms.privacy, replica.terms.queries)
        self._finished: _FinishedRound | None = None  # while the server moves to the next round
        self._open_round()
        self._sampled: tuple[int, frozenset[int]] | None = None  # (round, ids of its participants)

    def _open_round(self) -> None:
        self._answers = Answers()
        self._bytes_up = self._bytes_down = 0
        self._rejected_before = Counter(self.rejected)
        self._claimed_before = frozenset(self.claimed_examples)
        self._releases_before = dict(self._releases.of_rejected)

    @property
    def round(self) -> int:
        """The current round, from 1; 0 during the calibration."""
        if self._finished is not None:  # ``finish_round`` was interrupted
            return self._finished.result.record.round
        return CALIBRATION if self._calibrating else self.replica.round

    def participants(self) -> list[int]:
        """Ids of the clients that take part in the current round, ascending; all clients in the calibration."""
        return sorted(self._sampled_clients())

    def unanswered(self) -> list[int]:
        """Ids of the participants whose answer has not been accepted so far, ascending."""
        return [] if self._finished is not None else sorted(self._sampled_clients() - self._answers.values.keys())

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
        self._complete_finished_round()
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
            return self.round, None, self.replica.masters().cpu().numpy()
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
        self._complete_finished_round()
        self._bytes_up += len(message)
        answer: TrainReply | Stale | None = None
        try:
            answer = decode_answer(message, self._max_values_of_reply())
            self._check_sender(answer, sender)
            if isinstance(answer, Stale):
                self._client_round[answer.client] = min(answer.at_round, self._client_round[answer.client])
                raise answer.as_error()
            check_reply(
                answer,
                self.replica.terms,
                steps=self.local_steps(answer.client),
                claimed=self.claimed_examples.get(answer.client),
                max_scalar=self._max_scalar,
                max_examples=self._max_examples,
            )
        except RejectedError as error:
            client = error.client if sender is None else sender
            name = f"client {client}" if client in self._client_round else "unknown"
            self.rejected[f"{name}: {error.rejection}"] += 1
            if client in self._client_round and not isinstance(answer, Stale):
                self._releases.add_rejected(client, None if answer is None else answer.examples)
            raise
        self._client_round[answer.client] = max(self.round, 1)
        self.claimed_examples[answer.client] = answer.examples
        self._answers.add(answer)
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
            raise rejection_error(answer, Rejection.UNKNOWN, "is not part of this federation")
        round = self.round
        if answer.round != round:
            raise rejection_error(answer, Rejection.ROUND, f"sent an answer for round {answer.round} in round {round}")
        if answer.client in self._answers.values:
            raise rejection_error(answer, Rejection.REPEATED, f"has already answered round {round}")
        if answer.client not in self._sampled_clients():
            raise rejection_error(answer, Rejection.NOT_SAMPLED, f"does not take part in round {round}")

    def finish_round(self) -> RoundResult:
        """Aggregates the answers, writes the round to the ledger, and updates the model.

        Raises:
            RoundFailedError: if no answer was accepted; the round stays open.
        """
        if self._finished is None:
            if not self._answers.values:
                raise RoundFailedError(
                    f"round {self.round}: no client sent a usable answer (rejected messages: "
                    f"{self.rejected_this_round()})"
                )
            scalars = ClientScalars.from_lists({}) if self.replica.terms.sends_weights else self._answers.scalars()
            traces = self._traces(self.round, scalars)
            result = RoundResult(record=self._make_record(scalars, traces), traces=traces)
            self._finish(result, self.rejected, in_ledger=False)
        return self._open_next_round()

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
        if self._finished is None:
            traces = self._traces(record.round, record.clients) if compute_traces or self._calibrating else {}
            self.claimed_examples |= record.examples
            self._releases.of_rejected |= record.rejected_examples
            self._client_round |= {i: max(record.round, 1) for i in record.clients if i in self._client_round}
            result = RoundResult(record=record, traces=traces)
            rejected = self.rejected + Counter(record.rejected)
            self._finish(result, rejected, in_ledger=True, update_model=update_model)
        return self._open_next_round()

    def _traces(self, round: int, scalars: Mapping[int, Sequence[float]]) -> Mapping[int, Trace]:
        if self._gradip is None or not scalars:
            return {}
        return self._gradip.traces(self.replica.terms.seeds(round), scalars)

    def _make_record(self, client_scalars: ClientScalars, traces: Mapping[int, Trace]) -> RoundRecord:
        """Aggregates the current round into its ledger line."""
        terms, number = self.replica.terms, self.round
        weights = client_weights(
            {i: self.claimed_examples[i] for i in self._answers.values}, self._aggregation.weighting
        )
        scalars: list[float] = []
        selection = Selection()
        masters = None
        if self._calibrating:
            assert self._select is not None
            selection = self._select(traces)
        elif terms.sends_weights:
            masters = mean_masters(self._answers.masters(), weights)
        else:
            scalars = aggregate(client_scalars, weights, terms.scalars_per_round, self._aggregation)
        return RoundRecord(
            round=number,
            lr=terms.learning_rates(number),
            scalars=scalars,
            clients=client_scalars,
            examples={i: self.claimed_examples[i] for i in sorted(self.claimed_examples.keys() - self._claimed_before)},
            loss=self._answers.mean_loss(self.claimed_examples, self._aggregation.weighting),
            steps=sum(map(self.local_steps, self._answers.values)),
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            rejected=self.rejected_this_round(),
            epsilon=self._releases.epsilon(self._steps_after_round(), self.claimed_examples),
            rejected_examples=dict(sorted(self._releases.of_rejected.items() - self._releases_before.items())),
            stopped=selection.stopped,
            thresholds=selection.thresholds,
            masters=masters,
        )

    def _steps_after_round(self) -> dict[int, int]:
        """Local steps requested from each client, those of the current round included."""
        this_round = {i: self._steps_requested[i] + self.local_steps(i) for i in self._sampled_clients()}
        return self._steps_requested | this_round

    def _finish(
        self, result: RoundResult, rejected: Counter[str], *, in_ledger: bool, update_model: bool = True
    ) -> None:
        self._finished = _FinishedRound(
            result=result,
            in_ledger=in_ledger,
            update_model=update_model,
            rejected=rejected,
            steps_requested=self._steps_after_round(),
        )

    def _complete_finished_round(self) -> None:
        """Moves the server to the next round if it was interrupted while it did that."""
        if self._finished is not None:
            self._open_next_round()

    def _open_next_round(self) -> RoundResult:
        """Writes the finished round to the ledger and moves the server to the next; returns the round's result.

        If this is interrupted, it is done again from the start. So every line leaves what it did before as it is.
        """
        assert self._finished is not None
        finished, record, replica = self._finished, self._finished.result.record, self.replica
        if self._ledger is not None and not finished.in_ledger and self._ledger.round != record.round:
            self._ledger.append(record)
        self.rejected, self._steps_requested = finished.rejected, finished.steps_requested
        if record.round == CALIBRATION:
            self.stopped, self._calibrating = frozenset(record.stopped), False
        else:
            del self._history[(record.round - 1) * replica.terms.scalars_per_round :]
            self._history.extend(record.scalars)
            if replica.round == record.round:
                self._update_replica(record, finished.update_model)
        self._open_round()
        self._finished = None
        return finished.result

    def _update_replica(self, record: RoundRecord, update_model: bool) -> None:
        if not update_model:
            self.replica.round = record.round + 1
        elif record.masters is not None:
            self.replica.load_masters(record.round + 1, record.masters)
        else:
            self.replica.apply_rounds([record.scalars])


__all__ = ["RoundFailedError", "RoundResult", "SelectionRule", "Server"]
