"""A run over many processes: rank 0 serves, and deals each round's clients to all; the others do what it asks.

The others have base model and examples like rank 0, and nothing else that lasts: no files, no server. Who has which
client may change from round to round, because a request says all that a client has to know.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...engine.errors import ConfigError, MeerkatError, RunError
from ...engine.mask import SparseMask
from ...engine.parameters import fingerprint
from ..config.run_config import RunConfig, make_config
from ..config.toml import config_toml, parse_toml
from ..messages import TrainRequest
from ..methods import Elements
from ..setup.data import encode, shares_of
from ..setup.mask import make_mask
from ..setup.model import load_language_model
from ..setup.server_and_clients import Federation
from .ranks import Ranks

_BEGIN, _JOIN, _ASK, _END = b"begin", b"join", b"ask", b"end"
_DONE, _FAILED = b"done", b"failed"
_TIMING = struct.Struct("<qdd")


class Team:
    """Rank 0's side.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._others = range(1, ranks.world)

    def begin(self, config: RunConfig) -> None:
        """Has the others load what a run works with, while rank 0 does.

        Raises:
            ConfigError: if clients cannot be shared in this run.
        """
        if self.ranks.per_client > 1:
            if config.method.recipe.sends_weights:
                raise ConfigError(f"{config.method} has no losses to share; leave --ranks-per-client out")
            if not config.step.micro_batch_size:
                raise ConfigError(
                    "--ranks-per-client deals a batch's micro-batches; give their size as --micro-batch-size, on which "
                    "the last bits of a loss depend"
                )
        self._send([_BEGIN, config_toml(config).encode()])

    def described(self) -> str:
        """How many processes there are, and for what: in words."""
        each = f"of which {self.ranks.per_client} share a client" if self.ranks.per_client > 1 else "each with a client"
        return f"{self.ranks.world} processes, {each} at a time"

    def check(self, base: str, digest: str) -> None:
        """Raises ``RunError`` unless all have this base model and these examples."""
        for rank in self._others:
            for what, mine, theirs in zip(("base model", "examples"), (base, digest), self._answer(rank), strict=True):
                if mine.encode() != theirs:
                    raise RunError(f"rank {rank} has another {what} than rank 0 ({theirs.decode()[:12]}, {mine[:12]})")

    def join(self, federation: Federation, mask: Path) -> None:
        """Takes the others into a run, after whose first rounds it may be."""
        whole = federation.config.method.recipe.elements is Elements.ALL
        digest = federation.server.replica.terms.mask_digest
        self._send([_JOIN, digest.encode(), b"" if whole else mask.read_bytes()])
        for rank in self._others:
            self._answer(rank)
        self._federation, self._at = federation, 1
        federation.timing.processes = self.ranks.teams
        self._clients = {client.id: client for client in federation.clients}

    def exchange(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """Has a round's requests answered by all; an ``Exchange``."""
        asked, now = list(requests), self._now()
        dealt = [asked[team :: self.ranks.teams] for team in range(self.ranks.teams)]
        per_client = self.ranks.per_client
        for rank in self._others:
            parts = [part for i, request in dealt[rank // per_client] for part in (struct.pack("<I", i), request)]
            self.ranks.send(rank, [_ASK, now, *parts])
        for i, request in dealt[0]:
            yield i, self._clients[i].handle(request)
        for rank in self._others:
            timing, *answers = self._answer(rank)
            if self.ranks.speaks(rank):
                self._federation.timing.add(*_TIMING.unpack(timing))
                yield from zip((i for i, _ in dealt[rank // per_client]), answers, strict=True)

    def end(self) -> None:
        """Lets the others go."""
        self._send([_END])

    def _now(self) -> bytes:
        """What the others' replicas have missed: a request to no client; nothing during the calibration.

        Much where a run is resumed. It spares them the answers of clients that are behind.
        """
        server = self._federation.server
        if not server.round:
            return b""
        first, scalars, masters = server.missed(self._at)
        self._at = server.round
        message = TrainRequest(
            client=0, round=server.round, local_steps=0, first_round=first, scalars=scalars, masters=masters
        )
        return message.encode()

    def _send(self, parts: list[bytes]) -> None:
        for rank in self._others:
            self.ranks.send(rank, parts)

    def _answer(self, rank: int) -> list[bytes]:
        status, *parts = self.ranks.receive(rank)
        if status == _FAILED:
            raise RunError(f"rank {rank}: {parts[0].decode()}")
        return parts


class _Helper:
    """What another rank has of a run."""

    def __init__(self, ranks: Ranks, config: RunConfig, trust_remote_code: bool) -> None:
        self._ranks, self._config = ranks, config
        self._lm = load_language_model(config, trust_remote_code=trust_remote_code)
        self._data = encode(config, self._lm.tokenizer)
        self._shares = shares_of(config, self._data)

    def looked_at(self) -> list[bytes]:
        """What rank 0 compares with its own."""
        return [fingerprint(self._lm.model).encode(), self._data.digest(self._shares).encode()]

    def join(self, digest: bytes, file: bytes) -> list[bytes]:
        """Builds the clients."""
        mask = SparseMask.from_bytes(file, self._lm.model) if file else make_mask(self._config, self._lm)
        if mask.digest.encode() != digest:
            raise RunError(f"the mask is {mask.digest[:12]}, on rank 0 it is {digest.decode()[:12]}")
        federation = Federation(
            self._config, self._lm.model, mask, self._data, self._shares, None, spread=self._ranks.spread
        )
        self._clients = {client.id: client for client in federation.clients}
        self._replica, self._timing = federation.server.replica, federation.timing
        return []

    def answer(self, now: bytes, *parts: bytes) -> list[bytes]:
        """Answers the requests that this process was dealt."""
        if now:
            missed = TrainRequest.decode(now)
            if missed.masters is not None:
                self._replica.jump(missed.round, missed.masters)
            elif missed.scalars is not None:
                self._replica.catch_up(missed.first_round, missed.scalars)
        before = self._times()
        answers = []
        for i, request in zip(parts[::2], parts[1::2], strict=True):
            answers.append(self._clients[struct.unpack("<I", i)[0]].handle(request))
        taken = (after - earlier for after, earlier in zip(self._times(), before, strict=True))
        return [_TIMING.pack(*taken), *answers]

    def _times(self) -> tuple[int, float, float]:
        return self._timing.steps, self._timing.forward, self._timing.total


def help_out(ranks: Ranks, *, trust_remote_code: bool) -> None:
    """The side of all ranks but 0: does what rank 0 asks for, until it says that this is all.

    Raises:
        RunError: if rank 0 has ended; on rank 1 alone, for one such message will do.
        SystemExit: likewise, on the others.
    """
    helper: _Helper | None = None
    while True:
        try:
            what, *parts = ranks.receive(0)
        except RunError as error:
            if ranks.rank > 1:
                raise SystemExit(1) from error
            raise RunError("rank 0 has ended; what it, or torchrun, said last is why") from error
        if what == _END:
            return
        try:
            if what == _BEGIN:
                config = make_config(parse_toml(parts[0].decode(), "the settings from rank 0"))
                helper = _Helper(ranks, config, trust_remote_code)
                answer = helper.looked_at()
            else:
                assert helper is not None
                answer = helper.join(*parts) if what == _JOIN else helper.answer(*parts)
        except (MeerkatError, OSError) as error:  # rank 0 tells it
            ranks.send(0, [_FAILED, str(error).encode()])
        else:
            ranks.send(0, [_DONE, *answer])


__all__ = ["Team", "help_out"]
