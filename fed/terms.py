"""``Terms``: what server and clients agree on before the first round, and then never send again."""

from dataclasses import dataclass

from .. import stream
from ..mask import SparseMask


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of a federation.

    Args:
        seed: root seed in [0, 2**64); every perturbation's seed follows from it.
        eps: perturbation scale.
        lr: learning rate (eta).
        local_steps: ``T``, scalars of a round.
        elements: ``k``, the size of the mask.
        mask_digest: of the mask.
    """

    seed: int
    eps: float
    lr: float
    local_steps: int
    elements: int
    mask_digest: str

    @classmethod
    def of(cls, mask: SparseMask, *, seed: int, eps: float, lr: float, local_steps: int) -> "Terms":
        """The terms of a federation that uses this mask."""
        return cls(seed=seed, eps=eps, lr=lr, local_steps=local_steps, elements=len(mask), mask_digest=mask.digest)

    def learning_rates(self, round: int) -> list[float]:
        """Learning rate of each of the round's ``T`` steps."""
        return [self.lr] * self.local_steps

    def seeds(self, round: int) -> list[int]:
        """Seed of each of the round's ``T`` steps; all clients share them."""
        return [stream.step_seed(self.seed, round, step) for step in range(self.local_steps)]


__all__ = ["Terms"]
