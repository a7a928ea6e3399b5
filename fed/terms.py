"""``Terms``: the settings that server and clients agree on before the first round and never send again."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from ..engine import stream
from ..engine.mask import SparseMask
from ..triton_kernels import reference
from .methods import Gradient
from .privacy import Privacy

# Round 0 is the calibration of virtual-path client selection: a path of every client from the base model. Its scalars
# are not aggregated.
CALIBRATION = 0


class Schedule(StrEnum):
    """Schedule of the learning rate over all steps of the run, from its full value towards 0."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of a federation.

    Args:
        seed: root seed in [0, 2**64); the seed of every perturbation is derived from it.
        eps: scale of the perturbations.
        lr: learning rate (eta) of the first step.
        local_steps: ``T``, number of local steps of a client in a round.
        elements: ``k``, number of elements in the mask.
        mask_digest: digest of the mask.
        queries: ``q``, number of queries of a step. Each has its own seed and scalar.
        gradient: how a client estimates the gradient of a step.
        schedule: schedule of the learning rate.
        rounds: ``R``, number of rounds; required unless the schedule is constant, for which it may be 0 (no limit).
        calibration_steps: ``T_cali``, number of local steps of a client in round 0; 0: no calibration.
        privacy: differential privacy of the scalars; None: they are not private.

    Raises:
        ValueError: if the schedule needs the number of rounds and it is missing.
    """

    seed: int
    eps: float
    lr: float
    local_steps: int
    elements: int
    mask_digest: str
    queries: int = 1
    gradient: Gradient = Gradient.TWO_POINT
    schedule: Schedule = Schedule.CONSTANT
    rounds: int = 0
    calibration_steps: int = 0
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        if self.schedule is not Schedule.CONSTANT and self.rounds < 1:
            raise ValueError(f"a {self.schedule} schedule needs the number of rounds, got {self.rounds}")

    @classmethod
    def for_mask(
        cls, mask: SparseMask, *, seed: int, eps: float, lr: float, local_steps: int, **others: object
    ) -> "Terms":
        """Makes the terms of a federation that uses this mask; see the class for the other arguments."""
        of_mask = {"elements": len(mask), "mask_digest": mask.digest}
        return cls(seed=seed, eps=eps, lr=lr, local_steps=local_steps, **of_mask, **others)  # type: ignore[arg-type]

    @property
    def sends_weights(self) -> bool:
        """See ``Gradient.sends_weights``."""
        return self.gradient.sends_weights

    @property
    def scalars_per_round(self) -> int:
        """Number of aggregated scalars of a round: ``T q``, one for each step and query."""
        return self.local_steps * self.queries

    def steps(self, round: int) -> int:
        """Number of local steps in a round of a client that is not stopped early."""
        return self.calibration_steps if round == CALIBRATION else self.local_steps

    def learning_rates(self, round: int) -> list[float]:
        """Learning rate of each of the round's steps.

        Raises:
            ValueError: if the schedule ends before this round.
        """
        steps = self.steps(round)
        if self.schedule is Schedule.CONSTANT or round == CALIBRATION:
            return [self.lr] * steps
        if round > self.rounds:
            raise ValueError(f"round {round} was requested, the {self.schedule} schedule ends with round {self.rounds}")
        total, first = self.rounds * self.local_steps, (round - 1) * self.local_steps
        if self.schedule is Schedule.LINEAR:
            return [self.lr * (1 - step / total) for step in range(first, first + steps)]
        return [self.lr * (1 + cosine) / 2 for cosine in _half_period_cosine(range(first, first + steps), total)]

    def query_learning_rates(self, round: int) -> list[float]:
        """Learning rate of each of the round's queries: its step's learning rate divided by ``q``."""
        return [lr / self.queries for lr in self.learning_rates(round) for _ in range(self.queries)]

    def seeds(self, round: int) -> list[int]:
        """Seed of each of the round's perturbations, ordered by step, then by query. All clients share the seeds."""
        return [
            stream.step_seed(self.seed, round, step, query)
            for step in range(self.steps(round))
            for query in range(self.queries)
        ]

    def updates(self, round: int, scalars: Sequence[float]) -> list[tuple[int, float, float]]:
        """Returns the round's updates as ``(seed, lr, g)``, in the format of ``replay``.

        Args:
            round: number of the round.
            scalars: the round's aggregated scalars, [T q].

        Returns:
            A tuple for each query, in which ``lr`` is the learning rate of the query.
        """
        return list(zip(self.seeds(round), self.query_learning_rates(round), scalars, strict=True))


def _half_period_cosine(steps: range, total: int) -> list[float]:
    """Computes ``cos(pi step / total)`` with the stream's own cosine.

    The cosines of math libraries differ in the last bit; those of replicas must not.
    """
    words = torch.tensor([round(step / total * 2**23) << 8 for step in steps], dtype=torch.int64, device="cpu")
    return reference.sin_cos(words)[1].tolist()


__all__ = ["CALIBRATION", "Schedule", "Terms"]
