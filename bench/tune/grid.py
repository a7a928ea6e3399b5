"""``Grid``: the learning rates, eps and densities that a search may try, in steps from the user's settings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...engine.errors import ConfigError
from ...fed.config.run_config import RunConfig

_LR_FACTOR, _EPS_FACTOR, _DENSITY_FACTOR = 2.0, 10.0, 10**0.5
_LR_STEPS = 5  # to each side at the start: 11 learning rates over three decades
_LR_REACH = 10  # to each side at most: three decades to each side
_OTHER_REACH = 2  # of eps (two decades to each side) and density (one)


@dataclass(frozen=True, order=True, kw_only=True)
class Point:
    """A point of the grid, in steps from the settings.

    Args:
        lr: steps of the learning rate; with a list of rates, the place in it.
        eps: steps of eps.
        density: steps of the density.
    """

    lr: int = 0
    eps: int = 0
    density: int = 0


class Grid:
    """The points that a search may try.

    Learning rates are a factor of 2 apart, eps 10, densities the square root of 10. A learning rate is multiplied by
    the square root of (density of the settings / density), because the fewer the elements, the larger the best one is.

    Args:
        config: the settings of the user's run.
        lrs: learning rates to try, at the density of the settings, and no others; empty: around that of the settings.
        eps: whether to try other eps.
        density: whether to try other densities.

    Attributes:
        axes: names of the settings that the search varies: lr, eps, density.

    Raises:
        ConfigError: if there is nothing to vary, or a value is out of range.
    """

    def __init__(self, config: RunConfig, lrs: Sequence[float], *, eps: bool, density: bool) -> None:
        self._config, self._lrs = config, sorted(set(lrs))
        self.axes = ["lr", *(["eps"] if eps else []), *(["density"] if density else [])]
        self._reaches = {"eps": _OTHER_REACH if eps else 0, "density": _OTHER_REACH if density else 0}
        if not lrs and config.step.lr == 0:
            raise ConfigError("lr is 0, so there is no rate to search around; give another --lr, or --lrs")
        if len(self._lrs) == 1:
            raise ConfigError(f"--lrs has only {self._lrs[0]:g}; give two learning rates or more")
        for lr in self._lrs:
            if not 0 < lr < math.inf:
                raise ConfigError(f"--lrs must be positive and finite, got {lr:g}")
        recipe = config.method.recipe
        if eps and recipe.sends_weights:
            raise ConfigError(f"{config.method} draws no perturbations, so it has no eps; leave --tune-eps out")
        if density and (config.mask.file is not None or not recipe.elements.uses_density):
            reason = "the mask file has one" if config.mask.file is not None else f"{config.method} has none"
            raise ConfigError(f"--tune-density tries other densities, and {reason}; leave one of them out")
        for point in self.start():
            self.config(point)  # raises ConfigError for a learning rate that does not fit the settings

    def start(self) -> list[Point]:
        """The points that a search begins with, by learning rate: eps and density are those of the settings."""
        return [Point(lr=i) for i in (range(len(self._lrs)) if self._lrs else range(-_LR_STEPS, _LR_STEPS + 1))]

    def neighbours(self, point: Point) -> list[Point]:
        """The points of the grid that are one step away from a point."""
        return [moved for axis in self.axes for step in (-1, 1) if self._has(moved := _moved(point, axis, step))]

    def smaller_lr(self, point: Point) -> Point | None:
        """The neighbour of a point with the next smaller learning rate; None if the grid has none."""
        smaller = _moved(point, "lr", -1)
        return smaller if self._has(smaller) else None

    def edges(self, point: Point) -> list[str]:
        """The edges of the grid that a point lies at, in words, such as "the smallest lr"."""
        return [
            f"the {extreme} {axis}"
            for axis in self.axes
            for step, extreme in ((-1, "smallest"), (1, "largest"))
            if not self._has(_moved(point, axis, step))
        ]

    def values(self, point: Point) -> dict[str, float]:
        """The settings of a point by their flat names, to four digits where they are not the user's own."""
        step, density = self._config.step, _DENSITY_FACTOR**point.density
        lr, steps = (self._lrs[point.lr], 0) if self._lrs else (step.lr, point.lr)
        return {
            "lr": _scaled(lr, _LR_FACTOR**steps / density**0.5),
            "eps": _scaled(step.eps, _EPS_FACTOR**point.eps),
            "density": _scaled(self._config.mask.density, density),
        }

    def config(self, point: Point) -> RunConfig:
        """The settings of the user's run with the values of a point."""
        return self._config.replace(**self.values(point))

    def _has(self, point: Point) -> bool:
        lr_fits = 0 <= point.lr < len(self._lrs) if self._lrs else abs(point.lr) <= _LR_REACH
        others_fit = all(abs(getattr(point, axis)) <= reach for axis, reach in self._reaches.items())
        return lr_fits and others_fit and self.values(point)["density"] <= 1


def _moved(point: Point, axis: str, step: int) -> Point:
    return replace(point, **{axis: getattr(point, axis) + step})


def _scaled(value: float, factor: float) -> float:
    return value if factor == 1 else float(f"{value * factor:.4g}")


__all__ = ["Grid", "Point"]
