"""``ClientPool``: where a run's clients are, and so who answers its requests.

``LocalPool``: in this process. ``torchrun.RankPool``: in all processes of a torchrun. ``RemotePool``: elsewhere, with
examples of their own, behind an exchange of messages such as Flower's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...engine.errors import ConfigError
from ...engine.lm.objective import MicroBatchMap
from ..config.run_config import RunConfig
from ..exchange import Exchange, local_exchange
from .server_and_clients import Federation


class ClientPool(Protocol):
    """Who answers a run's requests; a run goes through the methods in this order."""

    @property
    def simulated(self) -> bool:
        """Whether the run deals the clients their examples; otherwise they have their own."""

    @property
    def processes(self) -> int:
        """Number of processes that take steps."""

    @property
    def micro_batch_map(self) -> MicroBatchMap | None:
        """Computes the micro-batches of a step where several processes share a client; else None."""

    def prepare(self, config: RunConfig) -> Iterator[str]:
        """Before the model is loaded: has others load it too; yields lines for the log.

        Raises:
            ConfigError: if the settings do not fit this kind of pool.
        """

    def check(self, base: str, examples: str) -> None:
        """Compares the fingerprint of the base model and the digest of the examples with those of others.

        Raises:
            RunError: if they differ.
        """

    def connect(self, federation: Federation, mask: Path) -> Exchange:
        """What carries the run's requests, from the round that the federation is at.

        Args:
            federation: the run's server and clients.
            mask: file of the run's mask.
        """


class LocalPool:
    """All clients are in this process, on one copy of the model."""

    simulated, processes, micro_batch_map = True, 1, None

    def prepare(self, config: RunConfig) -> Iterator[str]:
        """Nothing: there is nobody else."""
        yield from ()

    def check(self, base: str, examples: str) -> None:
        """Nothing: there is nobody else."""

    def connect(self, federation: Federation, mask: Path) -> Exchange:
        """Asks the clients one after the other."""
        return local_exchange(federation.clients)


@dataclass(frozen=True)
class RemotePool:
    """The clients are elsewhere and have examples of their own.

    Args:
        exchange: carries requests to them and their answers back.
    """

    exchange: Exchange
    simulated, processes, micro_batch_map = False, 1, None

    def prepare(self, config: RunConfig) -> Iterator[str]:
        """Raises ``ConfigError`` for simulated attackers."""
        if config.attack.clients:
            raise ConfigError("attackers are simulated clients; where clients are elsewhere, leave them out")
        yield from ()

    def check(self, base: str, examples: str) -> None:
        """Nothing: every client checks what it is told of the run."""

    def connect(self, federation: Federation, mask: Path) -> Exchange:
        """The exchange, as it was given."""
        return self.exchange


__all__ = ["ClientPool", "LocalPool", "RemotePool"]
