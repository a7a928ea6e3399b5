"""A client: catches up, takes its local steps on its own data, and answers with scalars."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import stream
from ..clock import Clock
from ..errors import DataError, MessageError, NonFiniteLossError
from ..examples import Batch, EncodedTask
from ..objective import Objective, task_loss
from .messages import TrainReply, TrainRequest
from .replica import Replica


@dataclass
class Timing:
    """Where the time of some steps went, in seconds."""

    steps: int = 0
    forward: float = 0.0
    total: float = 0.0


class ClientData:
    """A client's examples, in an order of their own every epoch.

    Args:
        task: all examples.
        indices: int64, those of this client.
        batch_size: at most the number of indices.
        seed: of the order, in [0, 2**64).

    Raises:
        DataError: if there are fewer examples than a batch takes.
    """

    def __init__(self, task: EncodedTask, indices: Tensor, batch_size: int, seed: int) -> None:
        if indices.numel() == 0:
            raise DataError("the client has no examples")
        if not 1 <= batch_size <= indices.numel():
            raise DataError(f"the batch size is {batch_size}, the client has {indices.numel()} examples")
        self.task = task
        self.indices = indices
        self.batch_size = batch_size
        self.seen = 0  # the data pointer: examples taken since the beginning
        self._seed = seed
        self._epoch, self._order = -1, indices

    def __len__(self) -> int:
        return self.indices.numel()

    def next_indices(self) -> list[int]:
        """The next batch; an epoch ends before an example comes up again."""
        found: list[int] = []
        while len(found) < self.batch_size:
            epoch, at = divmod(self.seen, len(self))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = stream.permutation(stream.derived_seed(self._seed, "epoc", epoch), len(self))
            part = self._order[at : at + self.batch_size - len(found)]
            found += self.indices[part].tolist()
            self.seen += part.numel()
        return found

    def next_batch(self, objective: Objective, device: torch.device) -> Batch:
        """The next batch, for the given loss."""
        answers = "all" if objective is Objective.CANDIDATES else "gold"
        return self.task.batch(self.next_indices(), answers=answers, device=device)


@dataclass
class Client:
    """One client.

    Args:
        id: in [0, 2**32).
        data: its examples.
        replica: the model it trains; left at the beginning of the round it answered.
        objective: the loss.
        timing: filled as steps are taken; may be shared.
    """

    id: int
    data: ClientData
    replica: Replica
    objective: Objective
    timing: Timing = field(default_factory=Timing)

    def handle(self, message: bytes) -> bytes:
        """Answers a ``TrainRequest`` with a ``TrainReply``.

        Raises:
            MessageError: if the request is malformed or for another client.
            NonFiniteLossError: if a loss is NaN or infinite; the replica is left at the beginning of the round.
        """
        request = TrainRequest.decode(message)
        if request.client != self.id:
            raise MessageError(f"the request is for client {request.client}, this is client {self.id}")
        if not 1 <= request.local_steps <= self.replica.terms.local_steps:
            allowed = self.replica.terms.local_steps
            raise MessageError(f"{request.local_steps} local steps were asked for, the terms allow 1 to {allowed}")
        if request.masters is not None:
            self.replica.jump(request.round, request.masters)
        elif request.scalars is not None:
            self.replica.catch_up(request.first_round, request.scalars)
        if self.replica.round != request.round:
            raise MessageError(
                f"the request is for round {request.round}; this client stands at round {self.replica.round} with it"
            )
        scalars, loss = self._train(request.round, request.local_steps)
        return TrainReply(
            client=self.id, round=request.round, scalars=scalars, examples=len(self.data), loss=loss
        ).encode()

    def _train(self, round: int, steps: int) -> tuple[np.ndarray, float]:
        terms, device = self.replica.terms, next(self.replica.model.parameters()).device
        clock = Clock(device)
        forwards: list[tuple[Any, Any]] = []
        begun = clock.now()
        with self.replica.trial() as optimizer:
            try:
                losses = optimizer.step_many(
                    self._closures(round, steps, device, clock, forwards), terms.seeds(round)[:steps]
                )
                ended = clock.now()
                scalars = np.array(optimizer.projected_gradients, dtype=np.float32)
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"client {self.id}, round {round}: {error}") from error
        self.timing.total += clock.seconds(begun, ended)
        self.timing.forward += sum(clock.seconds(*forward) for forward in forwards)
        self.timing.steps += steps
        return scalars, torch.stack(losses).double().mean().item()

    def _closures(
        self, round: int, steps: int, device: torch.device, clock: Clock, forwards: list[tuple[Any, Any]]
    ) -> Iterator[Callable[[], Tensor]]:
        """The loss on each step's batch; sets the step's learning rate and notes begin and end of each forward."""
        for lr in self.replica.terms.learning_rates(round)[:steps]:
            self.replica.set_lr(lr)
            batch = self.data.next_batch(self.objective, device)

            def closure(batch: Batch = batch) -> Tensor:
                begun = clock.now()
                loss = task_loss(self.replica.model, batch, self.objective)
                forwards.append((begun, clock.now()))
                return loss

            yield closure


__all__ = ["Client", "ClientData", "Timing"]
