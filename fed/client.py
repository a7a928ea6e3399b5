"""A client: catches up, takes its local steps on its own data, and answers with scalars, which may be private.

A request says all that a client has to know: what it missed, and where it stands in its data. One that is started anew,
from base model and mask, goes on as if it had never stopped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine import stream
from ..engine.clock import Clock
from ..engine.errors import ConfigError, DataError, MessageError, NonFiniteLossError
from ..engine.lm.examples import Batch, EncodedTask
from ..engine.lm.objective import MicroBatchMap, Objective, example_losses, task_loss
from ..engine.private_closure import PrivateClosure
from ..engine.sgd import sgd_steps
from .messages import Stale, TrainReply, TrainRequest
from .privacy import Privacy
from .replica import Replica


@dataclass
class Timing:
    """Where the time of some steps went, in seconds, of processes that take some at a time."""

    steps: int = 0
    forward: float = 0.0
    total: float = 0.0
    processes: int = 1

    def add(self, steps: int, forward: float, total: float) -> None:
        """Counts some more steps."""
        self.steps += steps
        self.forward += forward
        self.total += total

    @property
    def rate(self) -> float:
        """Steps a second, all processes together."""
        return self.processes * self.steps / self.total if self.steps else 0.0


class ClientData:
    """A client's examples, in an order of their own every epoch, or each in a batch by chance.

    Args:
        task: all examples.
        indices: int64, those of this client.
        batch_size: at most the number of indices.
        seed: of the order or the chance, in [0, 2**64). Privacy by Poisson batches needs one that the client keeps to
            itself: it counts on nobody knowing who is in a batch.
        micro_batch_size: examples that one forward pass takes, at most; 0 is ``batch_size``.
        poisson: every batch takes each example independently with probability ``batch_size`` over their number, so
            that it has ``batch_size`` examples on average, and may have none.

    Attributes:
        seen: the data pointer: examples taken since the beginning; with Poisson batches, those expected.

    Raises:
        DataError: if there are fewer examples than a batch takes.
    """

    def __init__(
        self,
        task: EncodedTask,
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
        self._epoch, self._order = -1, indices

    def __len__(self) -> int:
        return self.indices.numel()

    def next_indices(self) -> list[int]:
        """The next batch; but for Poisson batches, an epoch ends before an example comes up again."""
        if self.poisson:
            seed = stream.derived_seed(self._seed, "pois", self.seen // self.batch_size)
            self.seek(self.seen // self.batch_size + 1)
            return self.indices[stream.poisson_sample(seed, len(self), self.batch_size)].tolist()
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

    def seek(self, steps: int) -> None:
        """Moves the data pointer to where it is after the batches of some steps from the beginning."""
        self.seen = steps * self.batch_size

    def next_batches(self, objective: Objective, device: torch.device) -> list[Batch]:
        """The next batch, for the given loss, in micro-batches; none if it has no examples."""
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
        privacy: what its scalars are to keep of its examples; then its data come in Poisson batches, of the same size,
            and it tells no loss. None: they keep nothing. The number of examples is sent as it is.
        noise_seed: with privacy, root of its noise, in [0, 2**64), the client's own secret: a deployment draws it anew
            by ``secrets.randbits(64)`` whenever a client starts. One that follows from a run's seed simulates privacy.
        micro_batch_map: computes the micro-batches of a step, where several processes share the client; None: this one.

    Raises:
        ConfigError: if the client trains by backpropagation, the data are not of such batches, or privacy and noise
            seed do not come together.
    """

    id: int
    data: ClientData
    replica: Replica
    objective: Objective
    timing: Timing = field(default_factory=Timing)
    privacy: Privacy | None = None
    noise_seed: int | None = None
    micro_batch_map: MicroBatchMap | None = None
    _last_private_round: int = field(
        default=-1, init=False, repr=False
    )  # the latest round that private scalars were made for

    def __post_init__(self) -> None:
        who = f"client {self.id}"
        if (self.privacy is None) != (self.noise_seed is None):
            raise ConfigError(f"{who}: privacy needs a noise seed, and a noise seed privacy")
        if self.privacy is None:
            if self.data.poisson:
                raise ConfigError(f"{who}: Poisson batches, which may be empty, are for private scalars")
            return
        if self.replica.terms.sends_weights:
            raise ConfigError(f"{who}: scalars can be private, the weights that backpropagation sends cannot")
        if not self.data.poisson or self.data.batch_size != self.privacy.batch_size:
            kind = "Poisson" if self.data.poisson else "plain"
            raise ConfigError(
                f"{who}: its privacy is that of Poisson batches of {self.privacy.batch_size}, its data come in {kind} "
                f"batches of {self.data.batch_size}"
            )

    def handle(self, message: bytes) -> bytes:
        """Answers a ``TrainRequest`` with a ``TrainReply``, or with ``Stale`` if it begins after where this client is.

        The same request gets the same answer, but from a private client, which gives one only.

        Raises:
            MessageError: if the request is malformed or for another client, or asks a private client for a round or
                for data that it has taken already.
            NonFiniteLossError: as ``train``.
        """
        request = TrainRequest.decode(message)
        if request.client != self.id:
            raise MessageError(f"the request is for client {request.client}, this is client {self.id}")
        allowed = self.replica.terms.steps(request.round)
        if not 1 <= request.local_steps <= allowed:
            raise MessageError(f"{request.local_steps} local steps were asked for, the terms allow 1 to {allowed}")
        if not self._catch_up(request):
            return Stale(client=self.id, round=request.round, at_round=self.replica.round).encode()
        self._seek_data(request)
        found, loss = self.train(request.round, request.local_steps)
        return TrainReply(
            client=self.id,
            round=request.round,
            local_steps=request.local_steps,
            examples=len(self.data),
            loss=loss,
            **found,
        ).encode()

    def _seek_data(self, request: TrainRequest) -> None:
        """Moves the data pointer to where the request says; a private client's never goes back."""
        if self.privacy is not None and request.steps_before * self.data.batch_size < self.data.seen:
            raise MessageError(
                f"the request is for data from step {request.steps_before} on, of which this client has taken some; a "
                f"private client takes each batch once"
            )
        self.data.seek(request.steps_before)

    def _catch_up(self, request: TrainRequest) -> bool:
        """Brings the replica to the round of a request, if it begins early enough; else, nothing is changed."""
        terms, wanted = self.replica.terms, max(request.round, 1)  # a calibration path starts from the base model
        if terms.rounds and request.round > terms.rounds:
            raise MessageError(f"the request is for round {request.round}, the terms end with round {terms.rounds}")
        if request.masters is not None:
            self.replica.load_masters(wanted, request.masters)
            return True
        assert request.scalars is not None
        brought = request.first_round + len(request.scalars) // terms.values
        leads_to = max(brought, self.replica.round) if request.round else self.replica.round
        if leads_to != wanted and len(request.scalars) % terms.values == 0:
            raise MessageError(
                f"the request is for round {request.round}; this client stands at round {leads_to} with it"
            )
        if request.first_round > self.replica.round:
            return False
        self.replica.catch_up(request.first_round, request.scalars)
        return True

    def train(self, round: int, steps: int) -> tuple[dict[str, np.ndarray], float | None]:
        """Takes a round's first steps from where the replica stands, which it leaves as it was.

        Returns:
            What goes up: "scalars" float32 [steps * queries], NaN where a query was not taken, or "masters" float32
            [k]; and the mean loss of the steps of which a query was taken and whose loss is finite, or None if there is
            none, or with privacy.

        Raises:
            NonFiniteLossError: by backpropagation, if a loss is NaN or infinite; the replica is left as it was.
            MessageError: with privacy, if the round is not later than the last: it would have the same noise.
        """
        if self.privacy is not None:
            if round <= self._last_private_round:
                raise MessageError(
                    f"round {round} was asked for after round {self._last_private_round}; a private client takes each "
                    f"round once, since the same noise on two answers would cancel"
                )
            self._last_private_round = round
        terms, device = self.replica.terms, next(self.replica.model.parameters()).device
        clock = Clock(device)
        forwards: list[tuple[Any, Any]] = []
        begun = clock.now()
        with self.replica.rolled_back() as optimizer:
            closures = self._closures(round, steps, device, clock, forwards)
            try:
                if terms.sends_weights:
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
        forward = sum(clock.seconds(*each) for each in forwards)
        self.timing.add(steps, forward, clock.seconds(begun, ended))
        return found, None if self.privacy is not None else _mean_finite_loss(losses, found.get("scalars"))

    def _closures(
        self, round: int, steps: int, device: torch.device, clock: Clock, forwards: list[tuple[Any, Any]]
    ) -> Iterator[Callable[[], Tensor]]:
        """The loss on each step's batch; sets the step's learning rate and notes begin and end of each forward."""
        evaluate = task_loss if self.privacy is None else example_losses
        for step, lr in enumerate(self.replica.terms.learning_rates(round)[:steps]):
            self.replica.set_lr(lr)
            batches = self.data.next_batches(self.objective, device)

            def closure(batches: list[Batch] = batches) -> Tensor:
                begun = clock.now()
                loss = evaluate(self.replica.model, batches, self.objective, self.micro_batch_map)
                forwards.append((begun, clock.now()))
                return loss

            if self.privacy is None:
                yield closure
            else:
                yield self._private(closure, self.privacy, round, step)

    def _private(self, losses: Callable[[], Tensor], privacy: Privacy, round: int, step: int) -> PrivateClosure:
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
    """Mean of the finite losses, of steps of which a scalar is a number; None if there is none."""
    values = torch.stack(losses).double().cpu()
    known = values.isfinite()
    if scalars is not None:
        known &= torch.from_numpy(np.isfinite(scalars).reshape(len(losses), -1).any(axis=1))
    return values[known].mean().item() if known.any() else None


__all__ = ["Client", "ClientData", "Timing"]
