"""The methods by name: which elements move, how a client finds its step, and which clients are stopped early.

A method is nothing but its recipe, so that any two differ in what their names say and in nothing else.

References:
    Meerkat, arXiv 2506.03337 (meerkat, meerkat-vp, weight-magnitude, lora-fedzo, full-fedzo, random stopping);
    DeComFL, arXiv 2405.15861 (decomfl); McMahan et al., arXiv 1602.05629 (fedavg).
"""

from dataclasses import dataclass
from enum import StrEnum


class Elements(StrEnum):
    """Which elements are trained."""

    SENSITIVITY = "sensitivity"  # largest mean squared gradient on pre-training text
    TASK = "task"  # the same on the task's own examples
    MAGNITUDE = "magnitude"
    RANDOM = "random"
    ALL = "all"
    LAYER = "layer"  # every element of one transformer block
    LORA = "lora"  # every element of low-rank adapters

    @property
    def ranked(self) -> bool:
        """Whether a density picks them, so that a mask file may take their place."""
        return self in (Elements.SENSITIVITY, Elements.TASK, Elements.MAGNITUDE, Elements.RANDOM)


class Gradient(StrEnum):
    """How a client finds the direction of a step."""

    TWO_POINT = "two-point"
    FORWARD_DIFFERENCE = "forward-difference"
    BACKPROPAGATION = "backpropagation"

    @property
    def sends_weights(self) -> bool:
        """Whether clients send their masked weights after a round, and not the scalars of its steps."""
        return self is Gradient.BACKPROPAGATION


class Stopping(StrEnum):
    """Which clients take one step a round instead of ``T``."""

    NONE = "none"
    VIRTUAL_PATH = "virtual-path"  # those that GradIP shows to be extreme non-IID
    RANDOM = "random"  # as many, chosen at random: the ablation


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a method consists of."""

    elements: Elements
    gradient: Gradient = Gradient.TWO_POINT
    stopping: Stopping = Stopping.NONE

    @property
    def sends_weights(self) -> bool:
        """See ``Gradient.sends_weights``."""
        return self.gradient.sends_weights

    @property
    def plain(self) -> bool:
        """Whether nothing but the mask tells it from the other plain ones."""
        return self.elements.ranked and self.gradient is Gradient.TWO_POINT and self.stopping is Stopping.NONE


class Method(StrEnum):
    """The methods that ``--method`` takes."""

    MEERKAT = "meerkat"
    MEERKAT_VP = "meerkat-vp"
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
        """What the method consists of."""
        return _RECIPES[self]


_RECIPES = {
    Method.MEERKAT: Recipe(elements=Elements.SENSITIVITY),
    Method.MEERKAT_VP: Recipe(elements=Elements.SENSITIVITY, stopping=Stopping.VIRTUAL_PATH),
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
