"""The methods: which elements are trained, how clients estimate gradients, and which clients are stopped early.

A method is defined by its recipe alone. Two methods differ only in the entries of their recipes.

References:
    Meerkat, arXiv 2506.03337 (meerkat, meerkat-vp, weight-magnitude, lora-fedzo, full-fedzo, random stopping);
    FZOO, arXiv 2506.09034 (meerkat-fzoo: its steps on Meerkat's elements);
    DeComFL, arXiv 2405.15861 (decomfl); McMahan et al., arXiv 1602.05629 (fedavg).
"""

from dataclasses import dataclass
from enum import StrEnum


class Elements(StrEnum):
    """Selection of the elements that are trained."""

    SENSITIVITY = "sensitivity"  # those with the largest mean squared gradient on pre-training text
    TASK = "task"  # those with the largest mean squared gradient on the task's examples
    MAGNITUDE = "magnitude"  # those with the largest absolute value
    RANDOM = "random"
    ALL = "all"
    LAYER = "layer"  # all elements of one transformer block
    LORA = "lora"  # all elements of low-rank adapters

    @property
    def uses_density(self) -> bool:
        """Whether a density determines their number, so that a mask file can replace the selection."""
        return self in (Elements.SENSITIVITY, Elements.TASK, Elements.MAGNITUDE, Elements.RANDOM)


class Gradient(StrEnum):
    """Method by which a client computes the gradient of a step."""

    TWO_POINT = "two-point"
    FORWARD_DIFFERENCE = "forward-difference"
    NORMALIZED_DIFFERENCE = "normalized-difference"
    BACKPROPAGATION = "backpropagation"

    @property
    def sends_weights(self) -> bool:
        """Whether clients send their masked weights after a round instead of scalars."""
        return self is Gradient.BACKPROPAGATION

    @property
    def least_queries(self) -> int:
        """Smallest number of perturbations of a step; see ``Estimator.least_queries``."""
        return 2 if self is Gradient.NORMALIZED_DIFFERENCE else 1

    def forwards(self, queries: int) -> int:
        """Number of forward passes of a step; backpropagation has a backward pass besides.

        Args:
            queries: ``q``, number of perturbations of a step.
        """
        if self is Gradient.BACKPROPAGATION:
            return 1
        return 2 * queries if self is Gradient.TWO_POINT else queries + 1


class Stopping(StrEnum):
    """Selection of the clients that are stopped early: they take one step a round instead of ``T``."""

    NONE = "none"
    VIRTUAL_PATH = "virtual-path"  # the extreme non-IID clients, identified by GradIP
    RANDOM = "random"  # the same number of clients, chosen at random (ablation)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Definition of a method.

    Args:
        elements: the elements that are trained.
        gradient: method by which clients compute gradients.
        stopping: the clients that are stopped early.
    """

    elements: Elements
    gradient: Gradient = Gradient.TWO_POINT
    stopping: Stopping = Stopping.NONE

    @property
    def sends_weights(self) -> bool:
        """See ``Gradient.sends_weights``."""
        return self.gradient.sends_weights

    @property
    def differs_only_in_mask(self) -> bool:
        """Whether it is two-point training of ranked elements without early stopping, so that only the mask varies."""
        return self.elements.uses_density and self.gradient is Gradient.TWO_POINT and self.stopping is Stopping.NONE


class Method(StrEnum):
    """Values of ``--method``."""

    MEERKAT = "meerkat"
    MEERKAT_VP = "meerkat-vp"
    MEERKAT_FZOO = "meerkat-fzoo"
    RANDOM_STOP = "random-stop"
    FULL_FEDZO = "full-fedzo"
    WEIGHT_MAGNITUDE = "weight-magnitude"
    RANDOM_MASK = "random-mask"
    TASK_MASK = "task-mask"
    LORA_FEDZO = "lora-fedzo"
    DECOMFL = "decomfl"
    LAYER_ZO = "layer-zo"
    FEDAVG = "fedavg"

    @property
    def recipe(self) -> Recipe:
        """The method's recipe."""
        return _RECIPES[self]


_RECIPES = {
    Method.MEERKAT: Recipe(elements=Elements.SENSITIVITY),
    Method.MEERKAT_VP: Recipe(elements=Elements.SENSITIVITY, stopping=Stopping.VIRTUAL_PATH),
    Method.MEERKAT_FZOO: Recipe(elements=Elements.SENSITIVITY, gradient=Gradient.NORMALIZED_DIFFERENCE),
    Method.RANDOM_STOP: Recipe(elements=Elements.SENSITIVITY, stopping=Stopping.RANDOM),
    Method.FULL_FEDZO: Recipe(elements=Elements.ALL),
    Method.WEIGHT_MAGNITUDE: Recipe(elements=Elements.MAGNITUDE),
    Method.RANDOM_MASK: Recipe(elements=Elements.RANDOM),
    Method.TASK_MASK: Recipe(elements=Elements.TASK),
    Method.LORA_FEDZO: Recipe(elements=Elements.LORA),
    Method.DECOMFL: Recipe(elements=Elements.ALL, gradient=Gradient.FORWARD_DIFFERENCE),
    Method.LAYER_ZO: Recipe(elements=Elements.LAYER),
    Method.FEDAVG: Recipe(elements=Elements.SENSITIVITY, gradient=Gradient.BACKPROPAGATION),
}

__all__ = ["Elements", "Gradient", "Method", "Recipe", "Stopping"]
