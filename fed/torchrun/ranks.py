"""The processes of one run, as ``torchrun`` starts them: how they find each other, and what carries bytes."""

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

from ...engine.errors import ConfigError, RunError
from ...engine.lm.objective import MicroBatchMap

# A process that dies is noticed at once, by its closed connection; this is for one that hangs.
_PATIENCE = timedelta(hours=6)
_RESUMABLE = "the rounds in the ledger are complete, and `run --resume` goes on from there"


class Ranks:
    """All processes of a run; rank 0 is the one that has the server, the run directory and the say.

    Some of them in a row may share the work of one client at a time; the first of these speaks for it.

    Args:
        per_client: processes that share a client's work, a divisor of their number.

    Attributes:
        rank: of this process, from 0.
        world: number of processes.
        teams: number of clients that can be worked on at a time.
        team: that this process belongs to, from 0.
    """

    def __init__(self, per_client: int) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.per_client = per_client
        self.teams, self.team = self.world // per_client, self.rank // per_client
        self._group: Any = None
        for team in range(self.teams):  # every process takes part in making every group
            group = distributed.new_group(list(range(team * per_client, (team + 1) * per_client)), timeout=_PATIENCE)
            self._group = group if team == self.team else self._group

    def is_speaker(self, rank: int) -> bool:
        """Whether a process speaks for those that share a client with it."""
        return rank % self.per_client == 0

    @property
    def others(self) -> range:
        """All ranks but 0."""
        return range(1, self.world)

    def send_to_all(self, parts: Sequence[bytes]) -> None:
        """Sends the same to all ranks but 0; raises what ``send`` raises."""
        for rank in self.others:
            self.send(rank, parts)

    def send(self, rank: int, parts: Sequence[bytes]) -> None:
        """Sends some bytes strings to another process; raises ``RunError`` if it, or this run, has ended."""
        sizes = torch.tensor([len(parts), *(len(part) for part in parts)])
        data = torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)
        with _told(rank):
            distributed.send(torch.tensor([len(sizes)]), rank)
            distributed.send(sizes, rank)
            distributed.send(data, rank)

    def receive(self, rank: int) -> list[bytes]:
        """Waits for what another process sends; raises ``RunError`` if it, or this run, has ended."""
        count = torch.empty(1, dtype=torch.int64)
        with _told(rank):
            distributed.recv(count, rank)
            sizes = torch.empty(int(count), dtype=torch.int64)
            distributed.recv(sizes, rank)
            lengths: list[int] = sizes[1:].tolist()
            data = torch.empty(max(1, sum(lengths)), dtype=torch.uint8)
            distributed.recv(data, rank)
        whole, ends = data.numpy().tobytes(), list(accumulate(lengths))
        return [whole[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    @property
    def micro_batch_map(self) -> MicroBatchMap | None:
        """Deals a batch's micro-batches to the processes that share a client; None where they do not share one."""
        return self._map_micro_batches if self.per_client > 1 else None

    def _map_micro_batches(
        self, parts: Sequence[Callable[[], Tensor]], sizes: Sequence[int], device: torch.device
    ) -> list[Tensor]:
        whole = torch.zeros(sum(sizes), device=device)
        places = list(whole.split(list(sizes)))
        for i in range(self.rank % self.per_client, len(parts), self.per_client):
            places[i].copy_(parts[i]().reshape(-1))
        with _told(None):
            distributed.all_reduce(whole, group=self._group)  # all but one of what is added up is 0: exact
        return places


@contextmanager
def torchrun_ranks(per_client: int) -> Iterator[Ranks | None]:
    """The processes that ``torchrun`` started this one with; None where it is on its own.

    Args:
        per_client: see ``Ranks``.

    Raises:
        ConfigError: if the number of processes is no multiple of it.
    """
    world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if world % per_client:
        raise ConfigError(
            f"{per_client} ranks per client do not divide the {world} processes of this run; "
            f"`torchrun --nproc-per-node N -m meerkat_engine run ...` starts N"
        )
    if world == 1:
        yield None
        return
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise ConfigError(
                f"process {local} of this host has no GPU, of which there are {gpus}; start fewer, or hide them all "
                f"with CUDA_VISIBLE_DEVICES= for a run on CPUs"
            )
        torch.cuda.set_device(local)
    with _told(None):
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    ranks = Ranks(per_client)
    if not ranks.rank:
        signal.signal(signal.SIGTERM, _stop)
    try:
        yield ranks
    finally:
        distributed.destroy_process_group()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """``torchrun`` ends all processes when it has lost one, and may be the first to notice."""
    raise RunError(f"this run was told to stop, as torchrun does when it has lost a process; {_RESUMABLE}")


@contextmanager
def _told(rank: int | None) -> Iterator[None]:
    """Turns what the network says of a lost process into an error of ours."""
    try:
        yield
    except RuntimeError as error:
        who = "a process" if rank is None else f"rank {rank}"
        raise RunError(f"{who} of this run was lost ({str(error).splitlines()[0]}); {_RESUMABLE}") from error


__all__ = ["Ranks", "torchrun_ranks"]
