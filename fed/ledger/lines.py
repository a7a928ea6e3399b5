"""The lines of a ledger, header and rounds, and their JSON fields (see ``docs/formats.md``)."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...engine import stream
from ...engine.errors import LedgerError
from ..aggregation import Aggregation, Rule, StoppedWeight, Weighting
from ..methods import Gradient
from ..privacy import Privacy
from ..scalars import ClientScalars
from ..selection import Thresholds
from ..terms import CALIBRATION, Schedule, Terms
from .decimals import numbers_to_text

FORMAT = "meerkat-ledger/3"


@dataclass(frozen=True, kw_only=True)
class LedgerHeader:
    """First line of a ledger.

    Args:
        terms: the federation's terms.
        base: fingerprint of the base model.
        method: name of the method.
        clients: ``K``, number of clients.
        aggregation: the aggregation rule and its settings.
    """

    terms: Terms
    base: str
    method: str
    clients: int
    aggregation: Aggregation

    def fields(self) -> dict[str, Any]:
        """Returns the line's JSON fields."""
        terms = self.terms
        return {
            "format": FORMAT,
            "stream_version": stream.VERSION,
            "seed": terms.seed,
            "eps": terms.eps,
            "lr": terms.lr,
            "schedule": terms.schedule,
            "rounds": terms.rounds,
            "local_steps": terms.local_steps,
            "queries": terms.queries,
            "gradient": terms.gradient,
            "calibration_steps": terms.calibration_steps,
            "elements": terms.elements,
            "mask": terms.mask_digest,
            "base": self.base,
            "method": self.method,
            "clients": self.clients,
            "aggregation": _aggregation_fields(self.aggregation),
            "privacy": None if terms.privacy is None else vars(terms.privacy),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundRecord:
    """Line of a round in a ledger.

    Args:
        round: number of the round, from 1; 0 is the calibration, which does not change the weights.
        lr: learning rate of each step, [T].
        scalars: aggregated scalars, fp32 values, [T q]; empty in round 0 and with ``masters``.
        clients: each client's own scalars, fp32 values, at most T q (T_cali q in round 0); NaN for a skipped query.
        examples: number of examples of each client that reported it for the first time.
        loss: mean training loss of the clients, weighted by ``p_i``; None if no client reported one.
        steps: total number of local steps in the accepted answers.
        bytes_up: total size of the messages from clients, rejected ones included.
        bytes_down: total size of the messages to clients.
        rejected: number of rejected messages by client and reason.
        epsilon: largest epsilon that a client has spent so far; None without privacy.
        rejected_examples: number of examples with which clients count for epsilon that have sent messages, none of
            which was accepted; of the clients for which it is new or changed. Only with privacy.
        stopped: ids of the clients that take one step a round from now on; in round 0 only.
        thresholds: the thresholds by which these clients were selected; in round 0 only.
        masters: float32 [k], the masked weights after the round if clients train by backpropagation; else None.
    """

    round: int
    lr: list[float]
    scalars: list[float]
    clients: Mapping[int, Sequence[float]]
    examples: dict[int, int] = field(default_factory=dict)
    loss: float | None = None
    steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    epsilon: float | None = None
    rejected_examples: dict[int, int] = field(default_factory=dict)
    stopped: list[int] = field(default_factory=list)
    thresholds: Thresholds | None = None
    masters: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoundRecord) and self.fields() == other.fields()

    def fields(self) -> dict[str, Any]:
        """Returns the line's JSON fields."""
        fields: dict[str, Any] = {
            "round": self.round,
            "lr": self.lr,
            "scalars": self.scalars,
            "clients": ClientScalars.from_lists(self.clients),
            "examples": {str(i): count for i, count in self.examples.items()},
            "loss": self.loss,
            "steps": self.steps,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "rejected": self.rejected,
        }
        if self.epsilon is not None:
            fields["epsilon"] = self.epsilon
        if self.rejected_examples:
            fields["rejected_examples"] = {str(i): count for i, count in self.rejected_examples.items()}
        if self.round == CALIBRATION:
            fields["stopped"] = self.stopped
            fields["thresholds"] = None if self.thresholds is None else vars(self.thresholds)
        if self.masters is not None:
            fields["masters"] = base64.b64encode(np.ascontiguousarray(self.masters, "<f4").tobytes()).decode()
        return fields


def client_scalars_json(scalars: ClientScalars) -> bytes:
    """Returns a JSON object with the list of each client's scalars; null for a skipped query.

    Raises:
        ValueError: if a scalar is infinite.
    """
    sent = np.arange(scalars.matrix.shape[1]) < scalars.counts[:, None]
    flat = scalars.matrix[sent]
    if np.isinf(flat).any():
        raise ValueError("a client's scalar is infinite, which JSON cannot represent")
    text, ends_of_numbers = numbers_to_text(flat)
    ends = np.append(0, ends_of_numbers)[scalars.counts.cumsum()]
    begins = np.append(0, ends)[:-1]
    ends_without_comma = ends - (scalars.counts > 0)  # a client without scalars has no comma
    lists = (
        b'"%d":[%b]' % (client, text[begin:end])
        for client, begin, end in zip(scalars.ids.tolist(), begins.tolist(), ends_without_comma.tolist(), strict=True)
    )
    return b"{%b}" % b",".join(lists)


def parse_header(fields: dict[str, Any], path: Path) -> LedgerHeader:
    """Makes a header from the JSON fields of line 1.

    Args:
        fields: the line's fields.
        path: path of the file, for error messages.

    Raises:
        LedgerError: if the format is another or a field is missing or invalid; the error names file and line.
    """
    if fields.get("format") != FORMAT:
        raise LedgerError(f"{path}, line 1: format is {fields.get('format')!r}, this version reads {FORMAT!r}")
    if fields.get("stream_version") != stream.VERSION:
        raise LedgerError(
            f"{path}, line 1: stream version is {fields.get('stream_version')!r}, this version reads {stream.VERSION}"
        )
    try:
        terms = Terms(
            seed=stream.check_seed(fields["seed"]),
            eps=float(fields["eps"]),
            lr=float(fields["lr"]),
            schedule=Schedule(fields["schedule"]),
            rounds=int(fields["rounds"]),
            local_steps=int(fields["local_steps"]),
            queries=int(fields["queries"]),
            gradient=Gradient(fields["gradient"]),
            calibration_steps=int(fields["calibration_steps"]),
            elements=int(fields["elements"]),
            mask_digest=str(fields["mask"]),
            privacy=None if fields["privacy"] is None else Privacy(**fields["privacy"]),
        )
        return LedgerHeader(
            terms=terms,
            base=str(fields["base"]),
            method=str(fields["method"]),
            clients=int(fields["clients"]),
            aggregation=_aggregation(fields["aggregation"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise LedgerError(f"{path}, line 1: the header is damaged ({error!r})") from error


def parse_round(fields: dict[str, Any], path: Path, number: int, header: LedgerHeader, expected: int) -> RoundRecord:
    """Makes a round from the JSON fields of its line.

    Args:
        fields: the line's fields.
        path: path of the file, for error messages.
        number: number of the line in the file, for error messages.
        header: the ledger's header.
        expected: number of the round that belongs on this line.

    Raises:
        LedgerError: if a field is missing or invalid, or does not fit the header; the error names file and line.
    """
    where = f"{path}, line {number}"
    terms = header.terms
    steps = terms.steps(expected)
    try:
        line = RoundRecord(
            round=int(fields["round"]),
            lr=[float(value) for value in fields["lr"]],
            scalars=[float(value) for value in fields["scalars"]],
            clients=_client_scalars(fields["clients"], steps * terms.queries),
            examples={int(i): int(count) for i, count in fields["examples"].items()},
            loss=None if fields["loss"] is None else float(fields["loss"]),
            steps=int(fields["steps"]),
            bytes_up=int(fields["bytes_up"]),
            bytes_down=int(fields["bytes_down"]),
            rejected={str(reason): int(count) for reason, count in fields["rejected"].items()},
            epsilon=float(fields["epsilon"]) if terms.privacy is not None else None,
            rejected_examples={int(i): int(count) for i, count in fields.get("rejected_examples", {}).items()},
            stopped=[int(i) for i in fields["stopped"]] if expected == CALIBRATION else [],
            thresholds=_thresholds(fields["thresholds"]) if expected == CALIBRATION else None,
            masters=_masters(fields["masters"]) if terms.sends_weights else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise LedgerError(f"{where}: the round is damaged ({error!r})") from error
    if line.round != expected:
        raise LedgerError(f"{where}: the line is of round {line.round}, round {expected} was expected")
    values = 0 if expected == CALIBRATION or line.masters is not None else terms.scalars_per_round
    if len(line.lr) != steps or len(line.scalars) != values:
        raise LedgerError(
            f"{where}: {len(line.lr)} learning rates and {len(line.scalars)} scalars, "
            f"{steps} and {values} were expected"
        )
    if line.masters is not None and len(line.masters) != terms.elements:
        raise LedgerError(f"{where}: {len(line.masters)} master values, {terms.elements} were expected")
    if terms.schedule is not Schedule.CONSTANT and expected > terms.rounds:
        raise LedgerError(f"{where}: the line is of round {expected}, the schedule ends with round {terms.rounds}")
    if line.lr != terms.learning_rates(expected):
        raise LedgerError(f"{where}: the learning rates do not follow from the header in line 1")
    if line.masters is not None and not np.isfinite(line.masters).all():
        raise LedgerError(f"{where}: a master value is not finite")
    client_scalars = ClientScalars.from_lists(line.clients).matrix
    scalars = np.concatenate([line.scalars, client_scalars[~np.isnan(client_scalars)]])
    with np.errstate(over="ignore"):
        rounded = scalars.astype(np.float32)
    if not (np.isfinite(rounded) & (rounded == scalars)).all():
        raise LedgerError(f"{where}: a scalar is not a finite fp32 number")
    return line


def _client_scalars(fields: dict[str, list[float | None]], max_scalars: int) -> ClientScalars:
    # Check first: ClientScalars allocates an array as wide as the longest row, and the file may come from an attacker.
    if any(len(scalars) > max_scalars for scalars in fields.values()):
        raise ValueError(f"a client has more than {max_scalars} scalars")
    return ClientScalars.from_lists({int(i): scalars for i, scalars in fields.items()})


def _aggregation_fields(aggregation: Aggregation) -> dict[str, Any]:
    fields = dict(vars(aggregation))
    if aggregation.stopped_weight is StoppedWeight.KEEP:  # as before there was a choice
        del fields["stopped_weight"]
    return fields


def _aggregation(fields: dict[str, Any]) -> Aggregation:
    typed = {
        "rule": Rule(fields["rule"]),
        "weighting": Weighting(fields["weighting"]),
        "stopped_weight": StoppedWeight(fields.get("stopped_weight", StoppedWeight.KEEP)),
    }
    return Aggregation(**{**fields, **typed})


def _thresholds(fields: dict[str, float] | None) -> Thresholds | None:
    return None if fields is None else Thresholds(**{name: float(value) for name, value in fields.items()})


def _masters(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")


__all__ = ["FORMAT", "LedgerHeader", "RoundRecord", "client_scalars_json", "parse_header", "parse_round"]
