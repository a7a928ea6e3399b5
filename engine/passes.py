"""``Passes``: the masked operations over all launch groups, without checks and without a record of what was done."""

from collections.abc import Sequence

from torch import Tensor

from .launch_groups import LaunchGroup


class Passes:
    """The operations of a program; see ``MaskedWeights.run_program_``, which does what is missing here.

    All seeds are int64 [1], all scales float32 [1], all coefficients float32 [groups].

    Args:
        groups: the launch groups.
        updates: number of updates that they have.
    """

    def __init__(self, groups: Sequence[LaunchGroup], updates: int) -> None:
        self._groups, self._updates = groups, updates

    def same_memory(self, other: "Passes") -> bool:
        """Whether both write the same masters and weights, so that what one has launched can be repeated."""
        return all(mine is theirs for mine, theirs in zip(self._groups, other._groups, strict=True))

    def perturb_(self, seed: Tensor, scale: Tensor) -> None:
        """Sets ``w <- cast(master + scale * z)``."""
        for group in self._groups:
            group.backend.perturb_(group.table, group.master, group.to_device(seed), group.to_device(scale))

    def update_(self, seed: Tensor, c: Tensor) -> None:
        """Applies ``master <- master - c * z``, then ``w <- cast(master)``."""
        for group in self._groups:
            group.backend.update_(
                group.table, group.master, group.to_device(seed), group.coefficient(c),
                applied=group.applied, number=self._updates,
            )  # fmt: skip
        self._updates += 1

    def update_perturb_(self, seed: Tensor, c: Tensor, next_seed: Tensor, scale: Tensor) -> None:
        """Does ``update_(seed, c)``, then ``perturb_(next_seed, scale)``, in one pass over the weights."""
        for group in self._groups:
            group.backend.update_perturb_(
                group.table, group.master, group.to_device(seed), group.coefficient(c), group.to_device(next_seed),
                group.to_device(scale), applied=group.applied, number=self._updates,
            )  # fmt: skip
        self._updates += 1


__all__ = ["Passes"]
