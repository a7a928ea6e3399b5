"""The lines of a ledger: what a header and a round are, and how they stand in the file (see ``docs/formats.md``)."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...engine import stream
from ...engine.errors import LedgerError
from ..aggregation import Aggregation, Rule, Weighting
from ..methods import Gradient
from ..privacy import Privacy
from ..scalars import ClientScalars
from ..selection import Thresholds
from ..terms import CALIBRATION, Schedule, Terms
from .decimals import texts

FORMAT = "meerkat-ledger/3"


@dataclass(frozen=True, kw_only=True)
class LedgerHeader:
    """First line of a ledger.

    Args:
        terms: of the federation.
        base: fingerprint of the base model.
        method: name of the method.
        clients: ``K``.
        aggregation: how a round is made of the clients' answers.
    """

    terms: Terms
    base: str
    method: str
    clients: int
    aggregation: Aggregation

    def fields(self) -> dict[str, Any]:
        """As they stand in the file."""
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
            "aggregation": vars(self.aggregation),
            "privacy": None if terms.privacy is None else vars(terms.privacy),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundRecord:
    """One line: what a round did.

    Args:
        round: from 1; 0 is the calibration of virtual-path selection, which moves nothing.
        lr: of each step, [T].
        scalars: aggregated, fp32, one a step and query, [T * queries]; none in round 0 or with ``masters``.
        clients: each client's own scalars, fp32, at most as many; NaN where a step was not taken.
        examples: number of examples of the clients that told theirs for the first time.
        loss: mean training loss of the clients, weighted by ``p_i``; None if none told it.
        steps: local steps that the clients answered for, in all.
        bytes_up: of all messages from clients.
        bytes_down: of all messages to clients.
        rejected: messages refused, by client and reason.
        epsilon: what the client that is protected least has spent of its privacy so far; None without privacy.
        stopped: ids of the clients that take one step a round from here on; told in round 0 only.
        thresholds: by which they were found; told in round 0 only.
        masters: float32 [k], where the clients train by backpropagation; else None.
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
    stopped: list[int] = field(default_factory=list)
    thresholds: Thresholds | None = None
    masters: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoundRecord) and self.fields() == other.fields()

    def fields(self) -> dict[str, Any]:
        """As they stand in the file."""
        fields: dict[str, Any] = {
            "round": self.round,
            "lr": self.lr,
            "scalars": self.scalars,
            "clients": ClientScalars.of(self.clients),
            "examples": {str(i): count for i, count in self.examples.items()},
            "loss": self.loss,
            "steps": self.steps,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "rejected": self.rejected,
        }
        if self.epsilon is not None:
            fields["epsilon"] = self.epsilon
        if self.round == CALIBRATION:
            fields["stopped"] = self.stopped
            fields["thresholds"] = None if self.thresholds is None else vars(self.thresholds)
        if self.masters is not None:
            fields["masters"] = base64.b64encode(np.ascontiguousarray(self.masters, "<f4").tobytes()).decode()
        return fields


def client_scalars_json(scalars: ClientScalars) -> bytes:
    """A JSON object with the list of each client's scalars, null for a query that was skipped.

    Raises:
        ValueError: if a scalar is infinite.
    """
    sent = np.arange(scalars.matrix.shape[1]) < scalars.counts[:, None]
    flat = scalars.matrix[sent]
    if np.isinf(flat).any():
        raise ValueError("a client's scalar is infinite, which is not JSON compliant")
    text, comma = texts(flat)
    # Without a client's scalars there is no comma behind them.
    ends = np.append(0, comma)[scalars.counts.cumsum()]
    begins = np.append(0, ends)[:-1]
    lists = (
        b'"%d":[%b]' % (client, text[begin:end])
        for client, begin, end in zip(
            scalars.ids.tolist(), begins.tolist(), (ends - (scalars.counts > 0)).tolist(), strict=True
        )
    )
    return b"{%b}" % b",".join(lists)


def parse_header(fields: dict[str, Any], path: Path) -> LedgerHeader:
    """The header that stands in a file; raises ``LedgerError`` naming the line."""
    if fields.get("format") != FORMAT:
        raise LedgerError(f"{path}, line 1: format {fields.get('format')!r}; this version reads {FORMAT!r}")
    if fields.get("stream_version") != stream.VERSION:
        raise LedgerError(
            f"{path}, line 1: stream version {fields.get('stream_version')!r}; this version makes {stream.VERSION}"
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
        raise LedgerError(f"{path}, line 1: damaged header ({error!r})") from error


def parse_round(fields: dict[str, Any], path: Path, number: int, header: LedgerHeader, expected: int) -> RoundRecord:
    """The round that stands in a line of a file; raises ``LedgerError`` naming the line."""
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
            stopped=[int(i) for i in fields["stopped"]] if expected == CALIBRATION else [],
            thresholds=_thresholds(fields["thresholds"]) if expected == CALIBRATION else None,
            masters=_masters(fields["masters"]) if terms.sends_weights else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise LedgerError(f"{path}, line {number}: damaged round ({error!r})") from error
    if line.round != expected:
        raise LedgerError(f"{path}, line {number}: holds round {line.round} where round {expected} belongs")
    values = 0 if expected == CALIBRATION or line.masters is not None else terms.values
    if len(line.lr) != steps or len(line.scalars) != values:
        raise LedgerError(f"{path}, line {number}: expected {steps} learning rates and {values} scalars")
    if line.masters is not None and len(line.masters) != terms.elements:
        raise LedgerError(f"{path}, line {number}: {len(line.masters)} master values for {terms.elements} elements")
    if terms.schedule is not Schedule.CONSTANT and expected > terms.rounds:
        raise LedgerError(f"{path}, line {number}: round {expected} of a schedule that ends with round {terms.rounds}")
    if line.lr != terms.learning_rates(expected):
        raise LedgerError(f"{path}, line {number}: other learning rates than those of line 1")
    if line.masters is not None and not np.isfinite(line.masters).all():
        raise LedgerError(f"{path}, line {number}: a master value is not finite")
    sent = ClientScalars.of(line.clients).matrix
    scalars = np.concatenate([line.scalars, sent[~np.isnan(sent)]])
    with np.errstate(over="ignore"):
        rounded = scalars.astype(np.float32)
    if not (np.isfinite(rounded) & (rounded == scalars)).all():
        raise LedgerError(f"{path}, line {number}: a scalar is not a finite fp32 number")
    return line


def _client_scalars(fields: dict[str, list[float | None]], most: int) -> ClientScalars:
    # Checked before there is a table as wide as the longest row, which whoever made the line chose.
    if any(len(own) > most for own in fields.values()):
        raise ValueError(f"a client with more than {most} scalars")
    return ClientScalars.of({int(i): own for i, own in fields.items()})


def _aggregation(fields: dict[str, Any]) -> Aggregation:
    typed = {"rule": Rule(fields["rule"]), "weighting": Weighting(fields["weighting"])}
    return Aggregation(**{**fields, **typed})


def _thresholds(fields: dict[str, float] | None) -> Thresholds | None:
    return None if fields is None else Thresholds(**{name: float(value) for name, value in fields.items()})


def _masters(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")


__all__ = ["FORMAT", "LedgerHeader", "RoundRecord", "client_scalars_json", "parse_header", "parse_round"]
