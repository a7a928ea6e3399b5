"""A small federation with the embedded model and task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from meerkat_engine import SparseMask
from meerkat_engine.engine import stream
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.objective import Objective
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.fed import Client, ClientData, Replica, Server, Terms
from meerkat_engine.fed.aggregation import Aggregation, Rule, Weighting
from meerkat_engine.fed.ledger.file import LedgerHeader, LedgerWriter, RoundRecord
from meerkat_engine.fed.partition import Partition, split


class Federation:
    """Server and clients, with one shared replica or with a replica each."""

    def __init__(
        self,
        data: EncodedTask,
        *,
        clients: int = 3,
        steps: int = 2,
        dtype: torch.dtype = torch.float32,
        weighting: Weighting = Weighting.EXAMPLES,
        rule: Rule = Rule.MEAN,
        max_scalar: float = 1e8,
        max_examples: int = 0,
        stopped: Sequence[int] = (),
        per_round: int | None = None,
        ledger: Path | None = None,
        shared: bool = True,
        density: float = 0.01,
        ids: list[int] | None = None,
        lr: float = 1e-2,
        **terms: Any,
    ) -> None:
        self.base = embedded.load(dtype)
        self.mask = SparseMask.random(self.base.model, density, 1)
        self.terms = Terms.for_mask(self.mask, seed=11, eps=1e-3, lr=lr, local_steps=steps, **terms)
        ids = ids if ids is not None else list(range(clients))
        self.writer = None
        if ledger is not None:
            header = LedgerHeader(
                terms=self.terms,
                base=fingerprint(self.base.model),
                method="test",
                clients=clients,
                aggregation=Aggregation(rule=rule, weighting=weighting),
            )
            self.writer = LedgerWriter(ledger, header)
        self.replica = self.fresh_replica(dtype)
        self.server = Server(
            ids,
            self.replica,
            self.writer,
            Aggregation(rule=rule, weighting=weighting),
            stopped=stopped,
            per_round=per_round,
            max_scalar=max_scalar,
            max_examples=max_examples,
        )
        shares = split(data.labels, clients, Partition.DIRICHLET, 3, alpha=0.5, at_least=8)
        self.clients = [
            Client(
                i,
                ClientData(data, share, 8, stream.derived_seed(11, "data", i)),
                self.replica if shared else self.fresh_replica(dtype),
                Objective.CANDIDATES,
            )
            for i, share in zip(ids, shares, strict=True)
        ]

    def fresh_replica(self, dtype: torch.dtype) -> Replica:
        """A new replica of the base model, at round 1."""
        return Replica(embedded.load(dtype).model, self.mask, self.terms)

    def round(self, members: list[int] | None = None) -> RoundRecord:
        """Runs one round with the clients at these positions in ``clients``; None: all."""
        for client in self.clients if members is None else [self.clients[i] for i in members]:
            self.server.receive(client.handle(self.server.request(client.id)))
        return self.server.finish_round().record

    @property
    def weights(self) -> str:
        """Fingerprint of the server's model."""
        return fingerprint(self.replica.model)
