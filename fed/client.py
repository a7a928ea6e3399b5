"""A client of a federation: catches up, takes local steps on its own data, and replies with scalars.

The scalars may be differentially private. A request contains all the state that a client needs: the rounds it missed
and its position in its data. A client that is restarted from base model and mask therefore continues as if it had never
stopped.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine import stream
from ..engine.captured import BoundLoss
from ..engine.clock import Clock
from ..engine.errors import ConfigError, DataError, MessageError, NonFiniteLossError
from ..engine.lm.example_set import Examples
from ..engine.lm.layout import Layout
from ..engine.lm.objective import AnyBatch, MicroBatchMap, Objective, example_losses, task_loss
from ..engine.private_closure import PrivateClosure
from ..engine.sgd import sgd_steps
from .messages import Stale, TrainReply, TrainRequest
from .privacy import Privacy
from .replica import Replica


@dataclass
class Timing:
    """Time that local steps took, in seconds.

    Attributes:
        steps: number of steps.
        forward: time in forward passes; NaN once a step was replayed from a CUDA graph, whose parts are not timed.
        total: time of the steps, forward passes included.
        processes: number of process groups that take steps in parallel; the other values are those of one group.
    """

    steps: int = 0
    forward: float = 0.0
    total: float = 0.0
    processes: int = 1

    def add(self, steps: int, forward: float, total: float) -> None:
        """Adds the times of more steps."""
        self.steps += steps
        self.forward += forward
        self.total += total

    @property
    def rate(self) -> float:
        """Steps per second of all processes together; 0 before the first step."""
        return self.processes * self.steps / self.total if self.steps else 0.0


class ClientData:
    """A client's examples, in batches: shuffled for every epoch, or sampled (Poisson batches).

    Args:
        task: the examples of all clients.
        indices: int64 [n], indices of this client's examples.
        batch_size: number of examples in a batch, in [1, n].
        seed: seed of the shuffling or sampling, in [0, 2**64). Privacy with Poisson batches needs a seed that only the
            client knows: it relies on nobody knowing which examples are in a batch.
        micro_batch_size: maximum number of examples in a forward pass; 0: ``batch_size``.
        poisson: whether each batch contains each example independently with probability ``batch_size / n``. A batch
            then has ``batch_size`` examples on average, and may be empty.

    Attributes:
        seen: the data pointer: number of examples returned since the beginning. With Poisson batches, the expected
            number.

    Raises:
        DataError: if the client has no examples, or fewer than a batch.
    """

    def __init__(
        self,
        task: Examples,
        indices: Tensor,
        batch_size: int,
        seed: int,
        micro_batch_size: int = 0,
        *,
        poisson: bool = False,
    ) -> None:
        if indices.numel() == 0:
            raise DataError("the client has no examples")
        if not 1 <= batch_size <= indices.numel():
            raise DataError(f"the batch size is {batch_size}, the client has {indices.numel()} examples")
        self.task = task
        self.indices = indices
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size or batch_size
        self.poisson = poisson
        self.seen = 0
        self._seed = seed
        self._shuffled: tuple[int, list[int]] = -1, []  # an epoch, and the order of its examples

    def __len__(self) -> int:
        return self.indices.numel()

    def next_indices(self) -> list[int]:
        """Returns the indices of the next batch.

        Without Poisson batches, an example is not repeated before all examples of the epoch have been returned.
        """
        if self.poisson:
            seed = stream.derived_seed(self._seed, "pois", self.seen // self.batch_size)
            self.seek(self.seen // self.batch_size + 1)
            return self.indices[stream.poisson_sample(seed, len(self), self.batch_size)].tolist()
        batch: list[int] = []
        while len(batch) < self.batch_size:
            epoch, position = divmod(self.seen, len(self))
            if epoch != self._shuffled[0]:
                order = stream.permutation(stream.derived_seed(self._seed, "epoc", epoch), len(self))
                self._shuffled = epoch, self.indices[order].tolist()
            part = self._shuffled[1][position : position + self.batch_size - len(batch)]
            batch += part
            self.seen += len(part)
        return batch

    def seek(self, steps: int) -> None:
        """Sets the data pointer to its position after ``steps`` batches from the beginning."""
        self.seen = steps * self.batch_size

    def next_batches(self, objective: Objective, device: torch.device) -> list[AnyBatch]:
        """Returns the next batch as micro-batches, encoded for the given loss; none if the batch is empty."""
        indices, size = self.next_indices(), self.micro_batch_size
        return [
            self.task.batch(indices[start : start + size], answers=objective.answers, device=device)
            for start in range(0, len(indices), size)
        ]


@dataclass(frozen=True)
class _TaskLoss:
    """The loss of a batch, which appends begin and end of each forward pass to ``forwards``.

    Equal for all clients of a replica, so that they share captured graphs.
    """

    model: nn.Module
    objective: Objective
    clock: Clock = field(compare=False)
    forwards: list[tuple[Any, Any]] = field(compare=False)

    def __call__(self, batches: list[AnyBatch], micro_batch_map: MicroBatchMap | None = None) -> Tensor:
        return self.timed(lambda: task_loss(self.model, batches, self.objective, micro_batch_map))

    def timed(self, forward: Callable[[], Tensor]) -> Tensor:
        """Computes and times a forward pass."""
        start = self.clock.now()
        loss = forward()
        if start is not None:
            self.forwards.append((start, self.clock.now()))
        return loss


@dataclass
class Client:
    """One client.

    Args:
        id: the client's id, in [0, 2**32).
        data: the client's examples.
        replica: the model that the client trains. After a reply, it is at the beginning of the round of the request.
        objective: the loss.
        timing: accumulates the time of the client's steps; several clients may share it.
        privacy: privacy of the scalars; None: they are not private. A private client needs data in Poisson batches of
            the same size, and reports no loss. Its number of examples is not protected.
        noise_seed: root seed of the privacy noise, in [0, 2**64); required with privacy. It must be the client's
            secret: a deployment draws it with ``secrets.randbits(64)`` whenever a client starts. A seed that is derived
            from a run's seed only simulates privacy.
        micro_batch_map: computes the micro-batches of a step if several processes share the client; None: this process
            computes all of them.

    Raises:
        ConfigError: if only one of ``privacy`` and ``noise_seed`` is given, if a private client trains by
            backpropagation, or if the data do not have the batches described at ``privacy``.
    """

    id: int
    data: ClientData
    replica: Replica
    objective: Objective
    timing: Timing = field(default_factory=Timing)
    privacy: Privacy | None = None
    noise_seed: int | None = None
    micro_batch_map: MicroBatchMap | None = None
    # Latest round for which private scalars were computed.
    _last_private_round: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        name = f"client {self.id}"
        if (self.privacy is None) != (self.noise_seed is None):
            raise ConfigError(f"{name}: privacy and noise_seed must be given together")
        if self.privacy is None:
            if self.data.poisson:
                raise ConfigError(f"{name}: Poisson batches may be empty, which only a private client can handle")
            return
        if self.replica.terms.sends_weights:
            raise ConfigError(f"{name}: a client that trains by backpropagation sends weights, which cannot be private")
        if not self.data.poisson or self.data.batch_size != self.privacy.batch_size:
            kind = "Poisson" if self.data.poisson else "plain"
            raise ConfigError(
                f"{name}: its data come in {kind} batches of {self.data.batch_size}, its privacy needs Poisson batches "
                f"of {self.privacy.batch_size}"
            )

    def handle(self, message: bytes) -> bytes:
        """Answers a request.

        The same request gets the same answer. A private client is the exception: it answers each request only once.

        Args:
            message: an encoded ``TrainRequest``.

        Returns:
            An encoded ``TrainReply``; or an encoded ``Stale``, if the request begins after the round of this client.

        Raises:
            MessageError: if the request is malformed or for another client, does not fit the terms, or asks a private
                client for a round or for data that it has already used.
            NonFiniteLossError: see ``train``.
        """
        request = TrainRequest.decode(message)
        if request.client != self.id:
            raise MessageError(f"the request is for client {request.client}, this is client {self.id}")
        allowed = self.replica.terms.steps(request.round)
        if not 1 <= request.local_steps <= allowed:
            raise MessageError(
                f"the request is for {request.local_steps} local steps, the federation's terms allow 1 to {allowed}"
            )
        if not self._catch_up(request):
            return Stale(client=self.id, round=request.round, at_round=self.replica.round).encode()
        self._seek_data(request)
        results, loss = self.train(request.round, request.local_steps)
        return TrainReply(
            client=self.id,
            round=request.round,
            local_steps=request.local_steps,
            examples=len(self.data),
            loss=loss,
            **results,
        ).encode()

    def _seek_data(self, request: TrainRequest) -> None:
        """Moves the data pointer to the request's position; a private client's pointer never moves backwards."""
        if self.privacy is not None and request.steps_before * self.data.batch_size < self.data.seen:
            raise MessageError(
                f"the request is for data from step {request.steps_before} on, some of which this client has already "
                f"used; a private client takes each batch once"
            )
        self.data.seek(request.steps_before)

    def _catch_up(self, request: TrainRequest) -> bool:
        """Brings the replica to the round of a request.

        Returns:
            False, with nothing changed, if the request begins after the replica's round.
        """
        terms, target = self.replica.terms, max(request.round, 1)  # a calibration path starts from the base model
        if terms.rounds and request.round > terms.rounds:
            raise MessageError(f"the request is for round {request.round}, the terms end with round {terms.rounds}")
        if request.masters is not None:
            self.replica.load_masters(target, request.masters)
            return True
        assert request.scalars is not None
        end_of_scalars = request.first_round + len(request.scalars) // terms.scalars_per_round
        reached = max(end_of_scalars, self.replica.round) if request.round else self.replica.round
        if reached != target and len(request.scalars) % terms.scalars_per_round == 0:
            raise MessageError(
                f"the request is for round {request.round}; its scalars bring this client to round {reached}"
            )
        if request.first_round > self.replica.round:
            return False
        self.replica.catch_up(request.first_round, request.scalars)
        return True

    def train(self, round: int, steps: int) -> tuple[dict[str, np.ndarray], float | None]:
        """Takes local steps from the replica's current state. The replica is restored afterwards, bit for bit.

        Args:
            round: number of the round, which determines seeds and learning rates.
            steps: number of steps, at most the round's.

        Returns:
            Two values. The results to send: either "scalars", float32 [steps * queries], NaN for a skipped query, or
            "masters", float32 [k]. The mean loss over the steps with a finite loss of which not every query was
            skipped; None if there is no such step, or with privacy.

        Raises:
            NonFiniteLossError: with backpropagation, if a loss is NaN or infinite; the replica is restored.
            MessageError: with privacy, if the round is not later than the last one: the noise would be the same.
        """
        if self.privacy is not None:
            if round <= self._last_private_round:
                raise MessageError(
                    f"round {round} was requested after round {self._last_private_round}; a private client takes each "
                    f"round once, because the same noise on two answers would cancel"
                )
            self._last_private_round = round
        terms, device = self.replica.terms, next(self.replica.model.parameters()).device
        clock, forwards = Clock(device), self.replica.forwards
        forwards.clear()
        captured = self.replica.optimizer.captured_steps
        loss = _TaskLoss(self.replica.model, self.objective, clock, forwards)
        start = clock.now()
        with self.replica.rolled_back() as optimizer:
            closures = self._closures(round, steps, device, loss)
            try:
                if terms.sends_weights:
                    losses = sgd_steps(
                        self.replica.model, optimizer.weights, closures, terms.learning_rates(round)[:steps]
                    )
                    end = clock.now()
                    results = {"masters": optimizer.weights.masters().cpu().numpy()}
                else:
                    losses = optimizer.step_many(closures, terms.seeds(round)[: steps * terms.queries])
                    end = clock.now()
                    results = {"scalars": np.array(optimizer.projected_gradients, dtype=np.float32)}
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"client {self.id}, round {round}: {error}") from error
        forward = sum(clock.seconds(*interval) for interval in forwards)
        if optimizer.captured_steps != captured:
            forward = math.nan
        self.timing.add(steps, forward, clock.seconds(start, end))
        if self.privacy is not None:
            return results, None
        return results, _mean_finite_loss(losses, results.get("scalars"))

    def _closures(self, round: int, steps: int, device: torch.device, loss: _TaskLoss) -> Iterator[Callable[[], Any]]:
        """Yields a closure for each step, which computes the loss on the step's batch.

        Sets the step's learning rate before it yields.
        """
        for step, lr in enumerate(self.replica.terms.learning_rates(round)[:steps]):
            self.replica.set_lr(lr)
            batches = self.data.next_batches(self.objective, device)
            if self.privacy is not None:
                forward = functools.partial(
                    example_losses, self.replica.model, batches, self.objective, self.micro_batch_map
                )
                yield self._private_closure(functools.partial(loss.timed, forward), self.privacy, round, step)
            elif self.micro_batch_map is not None or self.data.task.layout is not Layout.PACKED:
                # ranks exchange losses; and hardly two batches of the other layouts have the same shape
                yield functools.partial(loss, batches, self.micro_batch_map)
            else:
                yield BoundLoss(loss, batches)

    def _private_closure(self, losses: Callable[[], Tensor], privacy: Privacy, round: int, step: int) -> PrivateClosure:
        assert self.noise_seed is not None
        return PrivateClosure(
            losses,
            estimator=self.replica.optimizer.estimator,
            queries=self.replica.terms.queries,
            clip=privacy.clip,
            noise_multiplier=privacy.noise_multiplier,
            batch_size=privacy.batch_size,
            seed=stream.derived_seed(self.noise_seed, "nois", round, step),
        )


def _mean_finite_loss(losses: list[Tensor], scalars: np.ndarray | None) -> float | None:
    """Mean of the finite losses, over the steps with at least one finite scalar; None if there is none."""
    values = torch.stack(losses).double().cpu()
    counted = values.isfinite()
    if scalars is not None:
        counted &= torch.from_numpy(np.isfinite(scalars).reshape(len(losses), -1).any(axis=1))
    return values[counted].mean().item() if counted.any() else None


__all__ = ["Client", "ClientData", "Timing"]
