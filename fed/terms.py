"""``Terms``: what server and clients agree on before the first round, and then never send again."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from ..engine import stream
from ..engine.mask import SparseMask
from ..triton_kernels import reference
from .methods import Gradient
from .privacy import Privacy

# Round 0 is the calibration of virtual-path selection: a path of every client from the base model, not aggregated.
CALIBRATION = 0


class Schedule(StrEnum):
    """How the learning rate changes over the run's steps, from its full value towards 0."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of a federation.

    Args:
        seed: root seed in [0, 2**64); every perturbation's seed follows from it.
        eps: perturbation scale.
        lr: learning rate (eta) of the first step.
        local_steps: ``T``, steps of a client in a round.
        queries: perturbations of a step; each has a seed and a scalar of its own.
        gradient: how a client finds the direction of a step.
        schedule: of the learning rate.
        rounds: ``R``, which a schedule needs; 0 where it is constant.
        calibration_steps: ``T_cali``, steps of a client in round 0; 0 where there is none.
        elements: ``k``, the size of the mask.
        mask_digest: of the mask.
        privacy: what the scalars keep of a client's examples; None: nothing.
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
            raise ValueError(f"a {self.schedule} schedule needs the number of rounds")

    @classmethod
    def of(cls, mask: SparseMask, *, seed: int, eps: float, lr: float, local_steps: int, **others: object) -> "Terms":
        """The terms of a federation that uses this mask."""
        fixed = {"elements": len(mask), "mask_digest": mask.digest}
        return cls(seed=seed, eps=eps, lr=lr, local_steps=local_steps, **fixed, **others)  # type: ignore[arg-type]

    @property
    def sends_weights(self) -> bool:
        """See ``Gradient.sends_weights``."""
        return self.gradient.sends_weights

    @property
    def values(self) -> int:
        """Scalars of a round that is trained in: one a step and query."""
        return self.local_steps * self.queries

    def steps(self, round: int) -> int:
        """Steps of a client that is not stopped early."""
        return self.calibration_steps if round == CALIBRATION else self.local_steps

    def learning_rates(self, round: int) -> list[float]:
        """Learning rate of each of the round's steps."""
        steps = self.steps(round)
        if self.schedule is Schedule.CONSTANT or round == CALIBRATION:
            return [self.lr] * steps
        if round > self.rounds:
            raise ValueError(f"the {self.schedule} schedule ends with round {self.rounds}; round {round} was asked for")
        total, first = self.rounds * self.local_steps, (round - 1) * self.local_steps
        if self.schedule is Schedule.LINEAR:
            return [self.lr * (1 - step / total) for step in range(first, first + steps)]
        return [self.lr * (1 + cosine) / 2 for cosine in _half_turn(range(first, first + steps), total)]

    def query_learning_rates(self, round: int) -> list[float]:
        """Learning rate of each of the round's queries: an equal share of its step's."""
        return [lr / self.queries for lr in self.learning_rates(round) for _ in range(self.queries)]

    def seeds(self, round: int) -> list[int]:
        """Seed of each of the round's perturbations, ordered by step, then query; all clients share them."""
        return [
            stream.step_seed(self.seed, round, step, query)
            for step in range(self.steps(round))
            for query in range(self.queries)
        ]

    def updates(self, round: int, scalars: Sequence[float]) -> list[tuple[int, float, float]]:
        """(seed, lr, g) of each of the round's updates, as ``replay`` takes them; ``lr`` is a query's share."""
        return list(zip(self.seeds(round), self.query_learning_rates(round), scalars, strict=True))


def _half_turn(steps: range, total: int) -> list[float]:
    """``cos(pi step / total)``, by the stream's own cosine: libraries differ in its last bit, and replicas may not."""
    words = torch.tensor([round(step / total * 2**23) << 8 for step in steps])
    return reference.sin_cos(words)[1].tolist()


__all__ = ["CALIBRATION", "Schedule", "Terms"]
