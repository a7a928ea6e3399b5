"""``ClientPool``: the interface between a run and its clients, wherever these are.

Three classes implement it. ``LocalPool``: clients in this process. ``torchrun.RankPool``: clients in all processes of a
torchrun. ``RemotePool``: clients on other machines with examples of their own, reached by an ``Exchange`` of messages
such as Flower's.
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
    """The clients that answer a run's requests. A run calls the methods in this order."""

    @property
    def simulated(self) -> bool:
        """Whether the run deals examples to the clients; otherwise they have their own."""

    @property
    def processes(self) -> int:
        """Number of processes that compute steps."""

    @property
    def micro_batch_map(self) -> MicroBatchMap | None:
        """Computes the micro-batches of a step if several processes share a client; else None."""

    def prepare(self, config: RunConfig) -> Iterator[str]:
        """Makes other processes load the model and the examples, before this process does.

        Args:
            config: the settings.

        Yields:
            Lines for the log.

        Raises:
            ConfigError: if the settings do not fit this kind of pool.
        """

    def check(self, base: str, examples: str, layout: str) -> None:
        """Checks that other processes have the same base model and examples, and lay out batches in the same way.

        Args:
            base: fingerprint of the base model in this process.
            examples: digest of the examples in this process.
            layout: layout of the batches in this process.

        Raises:
            RunError: if they differ.
        """

    def connect(self, federation: Federation, mask: Path) -> Exchange:
        """The exchange that carries the run's requests, from the federation's current round on.

        Args:
            federation: the run's server and clients.
            mask: path of the run's mask file.
        """


class LocalPool:
    """A pool of clients in this process, which share one copy of the model."""

    simulated, processes, micro_batch_map = True, 1, None

    def prepare(self, config: RunConfig) -> Iterator[str]:
        """Does nothing, because there are no other processes."""
        yield from ()

    def check(self, base: str, examples: str, layout: str) -> None:
        """Does nothing, because there are no other processes."""

    def connect(self, federation: Federation, mask: Path) -> Exchange:
        """An exchange that calls the clients one after the other."""
        return local_exchange(federation.clients)


@dataclass(frozen=True)
class RemotePool:
    """A pool of clients on other machines, which have examples of their own.

    Args:
        exchange: carries requests to the clients and their answers back.
    """

    exchange: Exchange
    simulated, processes, micro_batch_map = False, 1, None

    def prepare(self, config: RunConfig) -> Iterator[str]:
        """Raises ``ConfigError`` if the settings ask for simulated attackers."""
        if config.attack.clients:
            raise ConfigError(
                "attackers are simulated clients, and the clients of this run are not simulated; "
                "leave attack and attackers out"
            )
        yield from ()

    def check(self, base: str, examples: str, layout: str) -> None:
        """Does nothing, because each client checks the base model and the mask itself."""

    def connect(self, federation: Federation, mask: Path) -> Exchange:
        """The exchange that the pool was made with."""
        return self.exchange


__all__ = ["ClientPool", "LocalPool", "RemotePool"]
