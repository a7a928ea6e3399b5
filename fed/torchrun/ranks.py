"""The processes of a run that ``torchrun`` started: process groups, and messages between ranks."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

from ... import __version__
from ...engine import stream
from ...engine.errors import ConfigError, RunError
from ...engine.lm.objective import MicroBatchMap

# For a process that hangs. One that dies is noticed immediately, because its connection closes.
_TIMEOUT = timedelta(hours=6)
_RESUMABLE = "the rounds in the ledger are complete, and `run --resume` continues from there"


class Ranks:
    """All processes of a run. Rank 0 has the server and the run directory, and directs the others.

    Processes with consecutive ranks form teams. A team computes one client at a time: its processes share the client's
    micro-batches. The first process of a team sends its answers.

    Args:
        per_client: number of processes in a team, a divisor of the number of processes.

    Attributes:
        rank: rank of this process, from 0.
        world: number of processes.
        per_client: number of processes in a team.
        teams: number of teams, and so of clients that are computed at a time.
        team: team of this process, from 0.
    """

    def __init__(self, per_client: int) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.per_client = per_client
        self.teams, self.team = self.world // per_client, self.rank // per_client
        self._group: Any = None
        for team in range(self.teams):  # every process must take part in the creation of every group
            group = distributed.new_group(list(range(team * per_client, (team + 1) * per_client)), timeout=_TIMEOUT)
            self._group = group if team == self.team else self._group

    def is_speaker(self, rank: int) -> bool:
        """Whether a process is the first of its team, whose answers count."""
        return rank % self.per_client == 0

    @property
    def others(self) -> range:
        """All ranks but 0."""
        return range(1, self.world)

    def send_to_all(self, parts: Sequence[bytes]) -> None:
        """Sends the same message to all ranks but 0; raises what ``send`` raises."""
        for rank in self.others:
            self.send(rank, parts)

    def send(self, rank: int, parts: Sequence[bytes]) -> None:
        """Sends a message to another process.

        Args:
            rank: rank of the receiver.
            parts: the message, as byte strings of any length.

        Raises:
            RunError: if the other process or this run has ended.
        """
        sizes = torch.tensor([len(parts), *map(len, parts)], dtype=torch.int64, device="cpu")
        data = torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)
        with _lost_process_error(rank):
            distributed.send(torch.tensor([len(sizes)], dtype=torch.int64, device="cpu"), rank)
            distributed.send(sizes, rank)
            distributed.send(data, rank)

    def receive(self, rank: int) -> list[bytes]:
        """Waits for a message from another process.

        Args:
            rank: rank of the sender.

        Returns:
            The parts of the message.

        Raises:
            RunError: if the other process or this run has ended.
        """
        count = torch.empty(1, dtype=torch.int64, device="cpu")
        with _lost_process_error(rank):
            distributed.recv(count, rank)
            sizes = torch.empty(int(count), dtype=torch.int64, device="cpu")
            distributed.recv(sizes, rank)
            lengths: list[int] = sizes[1:].tolist()
            data = torch.empty(max(1, sum(lengths)), dtype=torch.uint8, device="cpu")
            distributed.recv(data, rank)
        message, ends = data.numpy().tobytes(), list(accumulate(lengths))
        return [message[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    @property
    def micro_batch_map(self) -> MicroBatchMap | None:
        """Distributes a batch's micro-batches over the processes of a team; None if a team is one process."""
        return self._map_micro_batches if self.per_client > 1 else None

    def _map_micro_batches(
        self, parts: Sequence[Callable[[], Tensor]], sizes: Sequence[int], device: torch.device
    ) -> list[Tensor]:
        """Computes the losses of all micro-batches; see ``MicroBatchMap``."""
        losses = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        losses_of_parts = list(losses.split(list(sizes)))
        for i in range(self.rank % self.per_client, len(parts), self.per_client):
            losses_of_parts[i].copy_(parts[i]().reshape(-1))
        with _lost_process_error(None):
            distributed.all_reduce(losses, group=self._group)  # exact: of the summands of a loss, all but one are 0
        return losses_of_parts


def software() -> str:
    """What the bits of this process depend on besides its inputs: versions, and the number of threads."""
    return (
        f"meerkat-engine {__version__}, perturbation stream {stream.VERSION}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


@contextmanager
def torchrun_ranks(per_client: int) -> Iterator[Ranks | None]:
    """Joins the processes that ``torchrun`` started. A context manager, which leaves them at the end.

    Args:
        per_client: see ``Ranks``.

    Yields:
        The processes; None if this is the only one.

    Raises:
        ConfigError: if ``per_client`` does not divide the number of processes, or there are more processes than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if world % per_client:
        raise ConfigError(
            f"{per_client} ranks per client do not divide the {world} processes of this run; start a multiple of "
            f"{per_client} with `torchrun --nproc-per-node N -m meerkat_engine run ...`"
        )
    if world == 1:
        yield None
        return
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise ConfigError(
                f"process {local} of this host has no GPU, as the host has {gpus}; start at most {gpus} processes, or "
                f"hide all GPUs with CUDA_VISIBLE_DEVICES= for a run on CPUs"
            )
        torch.cuda.set_device(local)
    with _lost_process_error(None):
        _init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    ranks = Ranks(per_client)
    if not ranks.rank:
        signal.signal(signal.SIGTERM, _stop)
    try:
        yield ranks
    finally:
        distributed.destroy_process_group()


def _init_process_group(backend: str) -> None:
    """Initializes the default process group, under keys that no earlier attempt of a restarted torchrun has used.

    torchrun keeps its store when it restarts the processes (``--max-restarts``, torch 2.13 with ``--standalone``). With
    the same keys, they would read the addresses of processes that have ended, and fail or wait for them.
    """
    store, rank, world = next(distributed.rendezvous("env://", timeout=_TIMEOUT))  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore(f"attempt-{attempt}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world,
        timeout=_TIMEOUT,
    )


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Handles SIGTERM, which ``torchrun`` sends to all processes when one has ended, maybe before this one notices."""
    raise RunError(f"this run received SIGTERM, which torchrun sends when a process has ended; {_RESUMABLE}")


@contextmanager
def _lost_process_error(rank: int | None) -> Iterator[None]:
    """Turns the error of ``torch.distributed`` for a lost process into a ``RunError``; ``rank`` None: unknown."""
    try:
        yield
    except RuntimeError as error:
        process = "a process" if rank is None else f"rank {rank}"
        raise RunError(f"{process} of this run was lost ({str(error).splitlines()[0]}); {_RESUMABLE}") from error


__all__ = ["Ranks", "software", "torchrun_ranks"]
