"""Virtual-path client selection: which clients are extreme non-IID, by GradIP along a path from the base model.

    rho_later = mean |GradIP| over the initial steps / mean |GradIP| over the later steps
    rho_quie  = share of the later steps with |GradIP| < sigma

A client of one label soon predicts it, and its gradient vanishes: above both thresholds it is stopped early.

The thresholds may come from a null distribution: paths that the server runs on examples of its own as an IID client.
Such a path decays too, as the task is learned; how fast is what nobody could guess.

References:
    Meerkat, arXiv 2506.03337, section 4 (VPCS).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..engine import stream
from ..engine.errors import ConfigError

# A threshold lies so many standard deviations beyond the null paths' mean; sigma is this quantile of their later steps.
# Of 80 clients of the embedded tasks, half of one label, these found 35 and flagged 1 other; 3 and 0.25 found 32 and 1,
# but after 50 steps instead of 100 only 12, where these find 27 and flag 3 (4 null paths, seeds 0 to 3, 2026-11-25).
_DEVIATIONS, _QUIET = 2.0, 0.5


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Which steps of a path are compared: the first ``initial`` and the last ``later`` ones."""

    initial: int
    later: int


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """A client is flagged when it is above both ratios.

    Args:
        rho_later: how much larger GradIP was in the beginning.
        rho_quie: share of quiet steps, in [0, 1].
        sigma: ``|GradIP|`` below which a step is quiet.
    """

    rho_later: float
    rho_quie: float
    sigma: float


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of one path; see ``Thresholds``."""

    rho_later: float
    rho_quie: float

    def exceed(self, thresholds: Thresholds) -> bool:
        """Whether the path is an extreme non-IID client's."""
        return self.rho_later > thresholds.rho_later and self.rho_quie > thresholds.rho_quie


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Who is stopped early, and why.

    Args:
        stopped: ids, ascending.
        thresholds: by which clients were judged; None before the calibration.
        statistics: of each client's path.
    """

    stopped: list[int] = field(default_factory=list)
    thresholds: Thresholds | None = None
    statistics: dict[int, Statistics] = field(default_factory=dict)


def path_statistics(gradip: Sequence[float], windows: Windows, sigma: float) -> Statistics:
    """The statistics of one path; a path that went silent altogether has an infinite ``rho_later``."""
    initial, later = _windows(gradip, windows)
    silent = statistics.fmean(later)
    return Statistics(
        rho_later=statistics.fmean(initial) / silent if silent else math.inf,
        rho_quie=sum(value < sigma for value in later) / len(later),
    )


def null_thresholds(paths: Sequence[Sequence[float]], windows: Windows) -> Thresholds:
    """Thresholds from the GradIP of some paths of an IID client, at least 3.

    Raises:
        ConfigError: if one of them is silent in a window, which no threshold can be taken from.
    """
    if len(paths) < 3:
        raise ValueError(f"a null distribution needs at least 3 paths, got {len(paths)}")
    for i, path in enumerate(paths):
        if not all(any(window) for window in _windows(path, windows)):
            raise ConfigError(
                f"null path {i} has no GradIP but 0 in its first {windows.initial} or last {windows.later} steps; "
                f"raise eps or lower lr, or give vp_rho_later, vp_rho_quie and vp_sigma"
            )
    pooled = sorted(value for path in paths for value in _windows(path, windows)[1])
    sigma = pooled[int(_QUIET * len(pooled))]
    found = [path_statistics(path, windows, sigma) for path in paths]
    ratios = [math.log(each.rho_later) for each in found]
    quiet = [each.rho_quie for each in found]
    return Thresholds(
        rho_later=math.exp(statistics.fmean(ratios) + _DEVIATIONS * statistics.stdev(ratios)),
        rho_quie=min(statistics.fmean(quiet) + _DEVIATIONS * statistics.stdev(quiet), 1 - 1 / windows.later),
        sigma=sigma,
    )


def random_clients(clients: Sequence[int], count: int, seed: int) -> list[int]:
    """Some of the clients by chance, ascending."""
    chosen = stream.permutation(stream.derived_seed(seed, "stop"), len(clients))[:count]
    return sorted(clients[i] for i in chosen.tolist())


def _windows(gradip: Sequence[float], windows: Windows) -> tuple[list[float], list[float]]:
    sizes = [abs(value) for value in gradip]
    if not 1 <= windows.initial <= len(sizes) or not 1 <= windows.later <= len(sizes):
        raise ValueError(
            f"a path of {len(sizes)} steps has no {windows.initial} initial and {windows.later} later ones"
        )
    return sizes[: windows.initial], sizes[-windows.later :]


__all__ = ["Selection", "Statistics", "Thresholds", "Windows", "null_thresholds", "path_statistics", "random_clients"]
