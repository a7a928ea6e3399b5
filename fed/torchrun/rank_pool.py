"""``RankPool``: rank 0's side of a run over many processes; it serves, and deals each round's clients to all ranks.

The other ranks have base model and examples like rank 0, and nothing else that lasts: no files, no server. Which rank
has which client may change from round to round, because a request says all that a client has to know.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...engine.errors import ConfigError, RunError
from ...engine.lm.objective import MicroBatchMap
from ..config.run_config import RunConfig
from ..config.toml import config_toml
from ..messages import TrainRequest
from ..methods import Elements
from ..setup.server_and_clients import Federation
from .ranks import Ranks

# What rank 0 asks of the others, and how they answer.
LOAD, BUILD, ANSWER, END = b"load", b"build", b"answer", b"end"
DONE, FAILED = b"done", b"failed"
# Steps, seconds in forwards and seconds in all of one round's answers.
TIMING = struct.Struct("<qdd")


class RankPool:
    """The clients of a run are dealt to the processes of a torchrun; a ``ClientPool``.

    Args:
        ranks: the processes.
    """

    simulated = True

    def __init__(self, ranks: Ranks) -> None:
        self.processes = ranks.world
        self.micro_batch_map: MicroBatchMap | None = ranks.micro_batch_map
        self._ranks = ranks

    def prepare(self, config: RunConfig) -> Iterator[str]:
        """Has the other ranks load what the run works with, while rank 0 does.

        Raises:
            ConfigError: if clients cannot be shared in this run.
        """
        ranks = self._ranks
        if ranks.per_client > 1:
            if config.method.recipe.sends_weights:
                raise ConfigError(f"{config.method} has no losses to share; leave --ranks-per-client out")
            if not config.step.micro_batch_size:
                raise ConfigError(
                    "--ranks-per-client deals a batch's micro-batches; give their size as --micro-batch-size, on which "
                    "the last bits of a loss depend"
                )
        ranks.send_to_all([LOAD, config_toml(config).encode()])
        each = f"of which {ranks.per_client} share a client" if ranks.per_client > 1 else "each with a client"
        yield f"{ranks.world} processes, {each} at a time"

    def check(self, base: str, examples: str) -> None:
        """Raises ``RunError`` unless all ranks have this base model and these examples."""
        for rank in self._ranks.others:
            answers = _answer_of(self._ranks, rank)
            for what, mine, theirs in zip(("base model", "examples"), (base, examples), answers, strict=True):
                if mine.encode() != theirs:
                    raise RunError(f"rank {rank} has another {what} than rank 0 ({theirs.decode()[:12]}, {mine[:12]})")

    def connect(self, federation: Federation, mask: Path) -> "RankExchange":
        """Has the other ranks build the clients."""
        dense = federation.config.method.recipe.elements is Elements.ALL
        digest = federation.server.replica.terms.mask_digest
        self._ranks.send_to_all([BUILD, digest.encode(), b"" if dense else mask.read_bytes()])
        for rank in self._ranks.others:
            _answer_of(self._ranks, rank)
        return RankExchange(self._ranks, federation)

    def end(self) -> None:
        """Ends the other ranks."""
        self._ranks.send_to_all([END])


class RankExchange:
    """Has a round's requests answered by all ranks; an ``Exchange``.

    Args:
        ranks: the processes.
        federation: of rank 0; its replica may be at any round.
    """

    def __init__(self, ranks: Ranks, federation: Federation) -> None:
        self._ranks, self._federation = ranks, federation
        self._clients = {client.id: client for client in federation.clients}
        self._round_of_others = 1  # that the other ranks' replicas are at
        federation.timing.processes = ranks.teams

    def __call__(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """Deals the requests; rank 0 answers its own share while the others answer theirs."""
        ranks, asked, update = self._ranks, list(requests), self._update()
        dealt = [asked[team :: ranks.teams] for team in range(ranks.teams)]
        for rank in ranks.others:
            parts = [part for i, request in dealt[rank // ranks.per_client] for part in (struct.pack("<I", i), request)]
            ranks.send(rank, [ANSWER, update, *parts])
        for i, request in dealt[0]:
            yield i, self._clients[i].handle(request)
        for rank in ranks.others:
            timing, *answers = _answer_of(ranks, rank)
            if ranks.is_speaker(rank):
                self._federation.timing.add(*TIMING.unpack(timing))
                yield from zip((i for i, _ in dealt[rank // ranks.per_client]), answers, strict=True)

    def _update(self) -> bytes:
        """What the other ranks' replicas have missed, as a request to no client; empty during the calibration.

        Much where a run is resumed. It spares them the answers of clients that are behind.
        """
        server = self._federation.server
        if not server.round:
            return b""
        first, scalars, masters = server.missed(self._round_of_others)
        self._round_of_others = server.round
        message = TrainRequest(
            client=0, round=server.round, local_steps=0, first_round=first, scalars=scalars, masters=masters
        )
        return message.encode()


def _answer_of(ranks: Ranks, rank: int) -> list[bytes]:
    status, *parts = ranks.receive(rank)
    if status == FAILED:
        raise RunError(f"rank {rank}: {parts[0].decode()}")
    return parts


__all__ = ["ANSWER", "BUILD", "DONE", "END", "FAILED", "LOAD", "TIMING", "RankExchange", "RankPool"]
