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
from ..firstorder import sgd_steps
from ..objective import Objective, task_loss
from .messages import TrainReply, TrainRequest
from .methods import Gradient
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
        micro_batch_size: examples that one forward pass takes, at most; 0 is the whole batch.

    Raises:
        DataError: if there are fewer examples than a batch takes.
    """

    def __init__(
        self, task: EncodedTask, indices: Tensor, batch_size: int, seed: int, micro_batch_size: int = 0
    ) -> None:
        if indices.numel() == 0:
            raise DataError("the client has no examples")
        if not 1 <= batch_size <= indices.numel():
            raise DataError(f"the batch size is {batch_size}, the client has {indices.numel()} examples")
        self.task = task
        self.indices = indices
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size or batch_size
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

    def skip(self, steps: int) -> None:
        """Moves the data pointer on over the batches of some steps."""
        self.seen += steps * self.batch_size

    def next_batches(self, objective: Objective, device: torch.device) -> list[Batch]:
        """The next batch, for the given loss, in micro-batches."""
        answers = "all" if objective is Objective.CANDIDATES else "gold"
        indices, size = self.next_indices(), self.micro_batch_size
        return [
            self.task.batch(indices[start : start + size], answers=answers, device=device)
            for start in range(0, len(indices), size)
        ]


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
        allowed = self.replica.terms.steps(request.round)
        if not 1 <= request.local_steps <= allowed:
            raise MessageError(f"{request.local_steps} local steps were asked for, the terms allow 1 to {allowed}")
        if request.masters is not None:
            self.replica.jump(request.round, request.masters)
        elif request.scalars is not None:
            self.replica.catch_up(request.first_round, request.scalars)
        stands_at = max(request.round, 1)  # a calibration path starts from the base model
        if self.replica.round != stands_at:
            raise MessageError(
                f"the request is for round {request.round}; this client stands at round {self.replica.round} with it"
            )
        found, loss = self.train(request.round, request.local_steps)
        return TrainReply(
            client=self.id,
            round=request.round,
            local_steps=request.local_steps,
            examples=len(self.data),
            loss=loss,
            **found,
        ).encode()

    def train(self, round: int, steps: int) -> tuple[dict[str, np.ndarray], float]:
        """Takes a round's first steps from where the replica stands, which it leaves as it was.

        Returns:
            What goes up: "scalars" float32 [steps * queries], or "masters" float32 [k]; and the mean loss.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite.
        """
        terms, device = self.replica.terms, next(self.replica.model.parameters()).device
        clock = Clock(device)
        forwards: list[tuple[Any, Any]] = []
        begun = clock.now()
        with self.replica.trial() as optimizer:
            closures = self._closures(round, steps, device, clock, forwards)
            try:
                if terms.gradient is Gradient.BACKPROPAGATION:
                    losses = sgd_steps(
                        self.replica.model, optimizer.weights, closures, terms.learning_rates(round)[:steps]
                    )
                    ended = clock.now()
                    found = {"masters": optimizer.weights.masters().cpu().numpy()}
                else:
                    losses = optimizer.step_many(closures, terms.seeds(round)[: steps * terms.queries])
                    ended = clock.now()
                    found = {"scalars": np.array(optimizer.projected_gradients, dtype=np.float32)}
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"client {self.id}, round {round}: {error}") from error
        self.timing.total += clock.seconds(begun, ended)
        self.timing.forward += sum(clock.seconds(*forward) for forward in forwards)
        self.timing.steps += steps
        return found, torch.stack(losses).double().mean().item()

    def _closures(
        self, round: int, steps: int, device: torch.device, clock: Clock, forwards: list[tuple[Any, Any]]
    ) -> Iterator[Callable[[], Tensor]]:
        """The loss on each step's batch; sets the step's learning rate and notes begin and end of each forward."""
        for lr in self.replica.terms.learning_rates(round)[:steps]:
            self.replica.set_lr(lr)
            batches = self.data.next_batches(self.objective, device)

            def closure(batches: list[Batch] = batches) -> Tensor:
                begun = clock.now()
                loss = task_loss(self.replica.model, batches, self.objective)
                forwards.append((begun, clock.now()))
                return loss

            yield closure


__all__ = ["Client", "ClientData", "Timing"]
