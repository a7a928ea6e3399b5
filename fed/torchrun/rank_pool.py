"""``RankPool``: rank 0's side of a run over several processes. Rank 0 has the server and distributes the requests.

The other ranks hold the base model, the mask and the examples, but no files and no server. Which rank computes which
client may change from round to round, because a request contains all that a client needs to know.
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
from .ranks import Ranks, software

# Kinds of messages from rank 0, and of answers.
LOAD, BUILD, ANSWER, END = b"load", b"build", b"answer", b"end"
DONE, FAILED = b"done", b"failed"
# Times of one rank's answers in a round: steps, seconds in forward passes, seconds in total.
TIMING = struct.Struct("<qdd")


class RankPool:
    """A ``ClientPool`` that distributes a run's clients over the processes of a torchrun.

    Args:
        ranks: the processes of the run.
    """

    simulated = True

    def __init__(self, ranks: Ranks) -> None:
        self.processes = ranks.world
        self.micro_batch_map: MicroBatchMap | None = ranks.micro_batch_map
        self._ranks = ranks

    def prepare(self, config: RunConfig) -> Iterator[str]:
        """Makes the other ranks load model and examples, while rank 0 does the same.

        Args:
            config: the settings.

        Yields:
            A line for the log.

        Raises:
            ConfigError: if several ranks are to share a client, and the settings do not allow this.
        """
        ranks = self._ranks
        if ranks.per_client > 1:
            if config.method.recipe.sends_weights:
                raise ConfigError(
                    f"{config.method} trains by backpropagation, and only forward passes can be shared between ranks; "
                    f"leave --ranks-per-client out"
                )
            if not config.step.micro_batch_size:
                raise ConfigError(
                    "--ranks-per-client distributes a batch's micro-batches; give their size with --micro-batch-size "
                    "(it has no default here, because the last bits of a loss depend on it)"
                )
        ranks.send_to_all([LOAD, config_toml(config).encode()])
        sharing = f"of which {ranks.per_client} share a client" if ranks.per_client > 1 else "each with a client"
        yield f"{ranks.world} processes, {sharing} at a time"

    def check(self, base: str, examples: str, layout: str) -> None:
        """Checks that all ranks have the same base model, examples, layout, versions and number of threads.

        Raises:
            RunError: if one has others.
        """
        for rank in self._ranks.others:
            answers = _answer_of(self._ranks, rank)
            others_base, others_examples, others_layout, others_software = (part.decode() for part in answers)
            for name, own, other in (("base model", base, others_base), ("examples", examples, others_examples)):
                if own != other:
                    raise RunError(
                        f"the {name} on rank {rank} ({other[:12]}) and rank 0 ({own[:12]}) differ; "
                        f"give all processes the same files"
                    )
            if others_layout != layout:
                raise RunError(
                    f"rank {rank} found that its batches can be {others_layout}, and rank 0 {layout}; "
                    f"give --layout sorted"
                )
            if others_software != software():
                raise RunError(
                    f"rank {rank} runs {others_software}, and rank 0 {software()}; install the same versions "
                    f"everywhere, and set OMP_NUM_THREADS to the same number"
                )

    def connect(self, federation: Federation, mask: Path) -> "RankExchange":
        """Makes the other ranks create the clients, and returns the exchange."""
        dense = federation.config.method.recipe.elements is Elements.ALL
        digest = federation.server.replica.terms.mask_digest
        self._ranks.send_to_all([BUILD, digest.encode(), b"" if dense else mask.read_bytes()])
        for rank in self._ranks.others:
            _answer_of(self._ranks, rank)
        return RankExchange(self._ranks, federation)

    def end(self) -> None:
        """Makes the other ranks return."""
        self._ranks.send_to_all([END])


class RankExchange:
    """An ``Exchange`` that distributes a round's requests over all ranks.

    Args:
        ranks: the processes of the run.
        federation: server and clients of rank 0. Its replica may be at any round.
    """

    def __init__(self, ranks: Ranks, federation: Federation) -> None:
        self._ranks, self._federation = ranks, federation
        self._clients = {client.id: client for client in federation.clients}
        self._round_of_others = 1  # round of the other ranks' replicas
        federation.timing.processes = ranks.teams

    def __call__(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """Distributes the requests. Rank 0 answers its own share while the others answer theirs.

        Args:
            requests: client id and request.

        Yields:
            Client id and answer, of every request.
        """
        ranks, all_requests, update = self._ranks, list(requests), self._update()
        by_team = [all_requests[team :: ranks.teams] for team in range(ranks.teams)]
        for rank in ranks.others:
            team_requests = by_team[rank // ranks.per_client]
            parts = [part for i, request in team_requests for part in (struct.pack("<I", i), request)]
            ranks.send(rank, [ANSWER, update, *parts])
        for i, request in by_team[0]:
            yield i, self._clients[i].handle(request)
        for rank in ranks.others:
            timing, *answers = _answer_of(ranks, rank)
            if ranks.is_speaker(rank):
                self._federation.timing.add(*TIMING.unpack(timing))
                yield from zip((i for i, _ in by_team[rank // ranks.per_client]), answers, strict=True)

    def _update(self) -> bytes:
        """The rounds that the other ranks' replicas have missed, as a request that no client answers.

        It is large when a run is resumed. Without it, the clients on these ranks would answer that they are stale.

        Returns:
            The message; empty during the calibration.
        """
        server = self._federation.server
        if not server.round:
            return b""
        first, scalars, masters = server.missed_update(self._round_of_others)
        self._round_of_others = server.round
        message = TrainRequest(
            client=0, round=server.round, local_steps=0, first_round=first, scalars=scalars, masters=masters
        )
        return message.encode()


def _answer_of(ranks: Ranks, rank: int) -> list[bytes]:
    """Receives the parts of a rank's answer; raises ``RunError`` if the rank failed or was lost."""
    status, *parts = ranks.receive(rank)
    if status == FAILED:
        raise RunError(f"rank {rank}: {parts[0].decode()}")
    return parts


__all__ = ["ANSWER", "BUILD", "DONE", "END", "FAILED", "LOAD", "TIMING", "RankExchange", "RankPool"]
