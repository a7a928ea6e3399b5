"""What a round costs the server, by its number of clients: synthetic answers, the real server, checked before timed.

A round here is the first one, which costs most: every client tells its number of examples, and the ledger keeps it.
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

PARTS = ("receive", "gather", "GradIP", "aggregate", "ledger line", "rest of the round")
BESIDE = ("requests", "median", "trimmed mean", "reading the ledger")
T = TypeVar("T")
_SEED = 7
_CPU = torch.device("cpu")


def answers(clients: int, steps: int) -> list[bytes]:
    """A message of each client; every hundredth client could not take its first step."""
    scalars = stream.normal(_SEED, torch.arange(clients * steps)).reshape(clients, steps).numpy()
    scalars[::100, 0] = math.nan
    return [
        TrainReply(client=i, round=1, local_steps=steps, examples=1 + i % 997, loss=0.5, scalars=own).encode()
        for i, own in enumerate(scalars)
    ]


def of_clients(clients: int, steps: int, repeats: int) -> dict[str, Any]:
    """Checks and times rounds of some clients.

    Args:
        clients: that answer.
        steps: ``T``.
        repeats: at least 2, each of a server of its own.

    Raises:
        CheckError: if the round, or what the ledger kept of it, is not what its definition says.
    """
    messages = answers(clients, steps)
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as directory:
            runs.append(_round(messages, clients, steps, Path(directory)))
    names = (*PARTS, *BESIDE, "round")
    return {
        "clients": clients,
        "steps": steps,
        "repeats": repeats,
        "seconds": {name: asdict(Spread.of([run["seconds"][name] for run in runs])) for name in names},
        "cpu": {name: asdict(Spread.of([run["cpu"][name] for run in runs])) for name in names},
        "shares": {name: statistics.median(run["cpu"][name] / run["cpu"]["round"] for run in runs) for name in names},
        "ledger_bytes": runs[0]["ledger_bytes"],
        "memory": _memory(messages, clients, steps),
    }


def check(
    line: RoundRecord, sent: Mapping[int, Sequence[float]], examples: Mapping[int, int], kept: RoundRecord
) -> None:
    """Raises ``CheckError`` unless a round is the mean by its definition, and the ledger kept it."""
    total = sum(examples.values())
    for t, found in enumerate(line.scalars):
        mean = 0.0
        for i in sorted(sent):
            if not math.isnan(sent[i][t]):
                mean += examples[i] / total * sent[i][t]
        if found != round_fp32(mean):
            raise CheckError(f"{len(sent)} clients: scalar {t} is {found!r} and should be {round_fp32(mean)!r}")
    if kept != line:
        raise CheckError(f"{len(sent)} clients: the ledger reads back another round than was written")


def _round(messages: list[bytes], clients: int, steps: int, directory: Path) -> dict[str, Any]:
    """One round: the whole of it by the server, then its parts again, one by one, on the same answers."""
    path, times = directory / "ledger.jsonl", _Times()
    replica, gradip, header = _setup(clients, steps)
    with LedgerWriter(path, header) as ledger:
        server = _server(clients, replica, ledger, gradip)
        times.take("receive", lambda: _each(server.receive, messages))
        line = times.take("finish", server.finish_round).line
        times.take("requests", lambda: _each(server.request, range(clients)))
    kept = times.take("reading the ledger", lambda: read_ledger(path)).rounds[0]

    replies = [TrainReply.decode(message) for message in messages]
    rows = {reply.client: reply.scalars for reply in replies if reply.scalars is not None}
    examples = {reply.client: reply.examples for reply in replies}
    check(line, {i: row.tolist() for i, row in rows.items()}, examples, kept)

    how = header.aggregation
    weights = client_weights(examples, how.weighting)
    sent = {i: row.tobytes() for i, row in rows.items()}
    del replies, rows
    own = times.take("gather", lambda: ClientScalars.of_bytes(sent))
    times.take("GradIP", lambda: gradip.traces(header.terms.seeds(1), own))
    for name, rule in (("aggregate", Rule.MEAN), ("median", Rule.MEDIAN), ("trimmed mean", Rule.TRIMMED_MEAN)):
        times.take(name, partial(aggregate, own, weights, steps, replace(how, rule=rule)))
    with LedgerWriter(directory / "again.jsonl", header) as again:
        times.take("ledger line", lambda: again.append(line))
    times.derive()
    written = path.read_bytes()
    if (directory / "again.jsonl").read_bytes() != written:
        raise CheckError(f"{clients} clients: the same round made two different ledgers")
    return {**times.kinds, "ledger_bytes": len(written.splitlines()[1]) + 1}


def _memory(messages: list[bytes], clients: int, steps: int) -> dict[str, float]:
    """Bytes a client: of the server before a round, with all answers in, and at most while it finishes the round."""
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
            after, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    found = {"at the beginning": before, "all have answered": answered, "at most": most, "after the round": after}
    return {name: held / clients for name, held in found.items()}


def _setup(clients: int, steps: int) -> tuple[Replica, GradIP, LedgerHeader]:
    """A model whose size the clients' share of a round does not hang on."""
    model = embedded.load().model
    mask = SparseMask.random(model, 0.01, _SEED)
    mask = replace(mask, gradient=stream.normal(_SEED, mask.ids))
    terms = Terms.of(mask, seed=_SEED, eps=1e-3, lr=1e-3, local_steps=steps)
    header = LedgerHeader(terms=terms, base="0" * 64, method="meerkat", clients=clients, aggregation=Aggregation())
    return Replica(model, mask, terms), GradIP(mask, _CPU), header


def _server(clients: int, replica: Replica, ledger: LedgerWriter, gradip: GradIP) -> Server:
    return Server(list(range(clients)), replica, ledger, Aggregation(), gradip=gradip)


def _each(action: Callable[[Any], object], arguments: Iterable[Any]) -> None:
    for argument in arguments:
        action(argument)


class _Times:
    """Seconds of actions by name, on the clock and of this process's CPU: where others want the cores, these differ."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, float]] = {"seconds": {}, "cpu": {}}

    def take(self, name: str, action: Callable[[], T]) -> T:
        begin = time.perf_counter(), time.process_time()
        found = action()
        for kind, now, then in zip(self.kinds, (time.perf_counter(), time.process_time()), begin, strict=True):
            self.kinds[kind][name] = now - then
        return found

    def derive(self) -> None:
        """The round as a whole, and what of it the parts leave."""
        for times in self.kinds.values():
            times["round"] = times["receive"] + times["finish"]
            times["rest of the round"] = times.pop("finish") - sum(times[part] for part in PARTS[1:-1])


__all__ = ["BESIDE", "PARTS", "answers", "check", "of_clients"]
