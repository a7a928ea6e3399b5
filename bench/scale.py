"""Measures the server's cost of a round for a given number of clients, with the real server and synthetic replies.

The measured round is the first one, which costs most: the ledger records the number of examples of every client. Each
round is checked before its times are used.
"""

import math
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..engine import stream
from ..engine.lm import embedded
from ..engine.mask import SparseMask
from ..engine.weights import round_fp32
from ..fed.aggregation import Aggregation, Rule, aggregate, client_weights
from ..fed.gradip import GradIP
from ..fed.ledger.file import LedgerHeader, LedgerWriter, RoundRecord, read_ledger
from ..fed.messages import TrainReply
from ..fed.replica import Replica
from ..fed.scalars import ClientScalars
from ..fed.server import Server
from ..fed.terms import Terms
from .kernels import CheckError
from .measure import Spread

# Parts of a round, and operations that are measured in addition.
PARTS = ("receive", "gather", "GradIP", "aggregate", "ledger line", "rest of the round")
EXTRA_PARTS = ("requests", "median", "trimmed mean", "reading the ledger")
T = TypeVar("T")
_SEED = 7
_CPU = torch.device("cpu")


def encoded_replies(clients: int, steps: int) -> list[bytes]:
    """Returns one encoded reply per client. Every hundredth client skipped its first query.

    Args:
        clients: number of clients.
        steps: local steps ``T``, and scalars per reply.
    """
    scalars = stream.normal(_SEED, torch.arange(clients * steps, device="cpu")).reshape(clients, steps).numpy()
    scalars[::100, 0] = math.nan
    return [
        TrainReply(client=i, round=1, local_steps=steps, examples=1 + i % 997, loss=0.5, scalars=row).encode()
        for i, row in enumerate(scalars)
    ]


def measure_round(clients: int, steps: int, repeats: int) -> dict[str, Any]:
    """Checks and times a round.

    Args:
        clients: number of clients that reply.
        steps: local steps ``T``.
        repeats: number of repetitions, at least 2; each has a new server.

    Returns:
        Times, ledger size and memory, ready for JSON.

    Raises:
        CheckError: if the aggregate differs from its definition, or the ledger reads back another round.
    """
    messages = encoded_replies(clients, steps)
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as directory:
            runs.append(_time_round(messages, clients, steps, Path(directory)))
    names = (*PARTS, *EXTRA_PARTS, "round")
    return {
        "clients": clients,
        "steps": steps,
        "repeats": repeats,
        "seconds": {name: asdict(Spread.of([run["seconds"][name] for run in runs])) for name in names},
        "cpu": {name: asdict(Spread.of([run["cpu"][name] for run in runs])) for name in names},
        "shares": {name: statistics.median(run["cpu"][name] / run["cpu"]["round"] for run in runs) for name in names},
        "ledger_bytes": runs[0]["ledger_bytes"],
        "memory": _measure_memory(messages, clients, steps),
    }


def check(
    line: RoundRecord, sent: Mapping[int, Sequence[float]], examples: Mapping[int, int], read_back: RoundRecord
) -> None:
    """Checks that a round's scalars are the weighted mean, and that the ledger reads back the same round.

    Args:
        line: the round as the server finished it.
        sent: scalars of each client; NaN for a skipped query.
        examples: number of examples of each client.
        read_back: the round as read from the ledger.

    Raises:
        CheckError: if one of the two does not hold.
    """
    total = sum(examples.values())
    for t, scalar in enumerate(line.scalars):
        mean = 0.0
        for i in sorted(sent):
            if not math.isnan(sent[i][t]):
                mean += examples[i] / total * sent[i][t]
        expected = round_fp32(mean)
        if scalar != expected:
            raise CheckError(f"{len(sent)} clients: aggregated scalar {t} is {scalar!r}, expected {expected!r}")
    if read_back != line:
        raise CheckError(f"{len(sent)} clients: the round read back from the ledger differs from the one written")


def _time_round(messages: list[bytes], clients: int, steps: int, directory: Path) -> dict[str, Any]:
    """Times a complete round of the server, then each part again by itself, on the same replies."""
    path, times = directory / "ledger.jsonl", _Times()
    replica, gradip, header = _setup(clients, steps)
    with LedgerWriter(path, header) as ledger:
        server = _server(clients, replica, ledger, gradip)
        times.measure("receive", lambda: _call_for_each(server.receive, messages))
        line = times.measure("finish", server.finish_round).record
        times.measure("requests", lambda: _call_for_each(server.request, range(clients)))
    read_back = times.measure("reading the ledger", lambda: read_ledger(path)).rounds[0]

    replies = [TrainReply.decode(message) for message in messages]
    rows = {reply.client: reply.scalars for reply in replies if reply.scalars is not None}
    examples = {reply.client: reply.examples for reply in replies}
    check(line, {i: row.tolist() for i, row in rows.items()}, examples, read_back)

    aggregation = header.aggregation
    weights = client_weights(examples, aggregation.weighting)
    sent = {i: row.tobytes() for i, row in rows.items()}
    del replies, rows
    gathered = times.measure("gather", lambda: ClientScalars.from_bytes(sent))
    times.measure("GradIP", lambda: gradip.traces(header.terms.seeds(1), gathered))
    for name, rule in (("aggregate", Rule.MEAN), ("median", Rule.MEDIAN), ("trimmed mean", Rule.TRIMMED_MEAN)):
        times.measure(name, partial(aggregate, gathered, weights, steps, replace(aggregation, rule=rule)))
    second_path = directory / "again.jsonl"
    with LedgerWriter(second_path, header) as second_ledger:
        times.measure("ledger line", lambda: second_ledger.append(line))
    times.add_totals()
    written = path.read_bytes()
    if second_path.read_bytes() != written:
        raise CheckError(f"{clients} clients: two ledgers of the same round differ")
    return {**times.clocks, "ledger_bytes": len(written.splitlines()[1]) + 1}


def _measure_memory(messages: list[bytes], clients: int, steps: int) -> dict[str, float]:
    """Returns the server's memory in bytes per client.

    It is measured before a round, when all clients have replied, at its peak, and after the round.
    """
    replica, gradip, header = _setup(clients, steps)
    with tempfile.TemporaryDirectory() as directory, LedgerWriter(Path(directory) / "ledger.jsonl", header) as ledger:
        tracemalloc.start()
        try:
            server = _server(clients, replica, ledger, gradip)
            before = tracemalloc.get_traced_memory()[0]
            for message in messages:
                server.receive(message)
            answered = tracemalloc.get_traced_memory()[0]
            server.finish_round()
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    totals = {"at the beginning": before, "all have answered": answered, "at most": peak, "after the round": after}
    return {name: total / clients for name, total in totals.items()}


def _setup(clients: int, steps: int) -> tuple[Replica, GradIP, LedgerHeader]:
    """Returns a replica of the embedded model, its GradIP and a ledger header.

    The cost per client does not depend on the size of the model.
    """
    model = embedded.load().model
    mask = SparseMask.random(model, 0.01, _SEED)
    mask = replace(mask, gradient=stream.normal(_SEED, mask.ids))
    terms = Terms.for_mask(mask, seed=_SEED, eps=1e-3, lr=1e-3, local_steps=steps)
    header = LedgerHeader(terms=terms, base="0" * 64, method="meerkat", clients=clients, aggregation=Aggregation())
    return Replica(model, mask, terms), GradIP(mask, _CPU), header


def _server(clients: int, replica: Replica, ledger: LedgerWriter, gradip: GradIP) -> Server:
    return Server(list(range(clients)), replica, ledger, Aggregation(), gradip=gradip)


def _call_for_each(action: Callable[[Any], object], arguments: Iterable[Any]) -> None:
    for argument in arguments:
        action(argument)


class _Times:
    """Times of named actions, in seconds.

    Attributes:
        clocks: by clock, the seconds of each action. "seconds" is elapsed time, "cpu" is CPU time of this process. They
            differ if other processes use the cores.
    """

    def __init__(self) -> None:
        self.clocks: dict[str, dict[str, float]] = {"seconds": {}, "cpu": {}}

    def measure(self, name: str, action: Callable[[], T]) -> T:
        """Runs an action, records its times under ``name`` and returns its value."""
        start = time.perf_counter(), time.process_time()
        value = action()
        end = time.perf_counter(), time.process_time()
        for clock, started, ended in zip(self.clocks, start, end, strict=True):
            self.clocks[clock][name] = ended - started
        return value

    def add_totals(self) -> None:
        """Adds the time of the complete round, and that of the rest of the round: what the parts do not cover."""
        for times in self.clocks.values():
            times["round"] = times["receive"] + times["finish"]
            times["rest of the round"] = times.pop("finish") - sum(times[part] for part in PARTS[1:-1])


__all__ = ["EXTRA_PARTS", "PARTS", "check", "encoded_replies", "measure_round"]
