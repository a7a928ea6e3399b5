"""Virtual-path client selection: identifies extreme non-IID clients by GradIP along a path from the base model.

    rho_later = mean |GradIP| over the initial steps / mean |GradIP| over the later steps
    rho_quie  = share of the later steps with |GradIP| < sigma

A client with examples of a single label soon learns to predict it, and its gradient vanishes. A client above both
thresholds is stopped early.

The thresholds may be derived from null paths, which the server runs on its own held-out examples as an IID client.
Their GradIP decays too, because the task is learned. How fast it decays cannot be predicted, so it is measured.

A server without examples takes the thresholds from the clients' own paths. It compares them with the client at the
lower quartile of rho_later, which is an IID client unless three quarters of the clients are extreme. All paths share
their perturbations, so what is left between IID clients is chance. Its size follows from a path itself: where the
projected gradient is normal, as that on a random direction is, the relative variance of a window's mean |GradIP| is

    (1 - 2 / pi) sum_t GradIP_t**2 / (sum_t |GradIP_t|)**2

References:
    Meerkat, arXiv 2506.03337, section 4 (VPCS).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ..engine import stream
from ..engine.errors import ConfigError

# A threshold is _DEVIATIONS standard deviations above the mean of the null paths. Sigma is the _QUIET quantile of
# |GradIP| in their later steps. Measured on 80 clients of the embedded tasks, 40 of them with a single label (4 null
# paths, seeds 0 to 3, 2026-11-25):
#     2 and 0.5:  after 100 steps 35 of the 40 and 1 other client are flagged, after 50 steps 27 and 3
#     3 and 0.25: after 100 steps 32 and 1, after 50 steps only 12
_DEVIATIONS, _QUIET = 2.0, 0.5
# From the clients' own paths, a threshold is _ERRORS standard errors above the lower quartile of rho_later, or above a
# half for rho_quie. Measured on 80 clients of the embedded tasks, 40 of them with a single label (seeds 0 to 3,
# 2026-11-27): after 100 steps 37 of the 40 are flagged (with 3 errors: 32), after 50 steps 29 (27), and no IID client.
# In federations of these 40 IID clients alone, 3 are flagged after 100 steps (0), and 1 after 50 (0).
_ERRORS = 2.0
MIN_CLIENTS = 4  # for a lower quartile


class NullPaths(StrEnum):
    """Source of the paths that the thresholds are derived from.

    HELD_OUT: paths that the server runs on its own labelled examples. CLIENTS: the paths of the clients themselves.
    """

    HELD_OUT = "held-out"
    CLIENTS = "clients"


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of a path that are compared.

    Args:
        initial: number of values (one for each step and query) at the beginning of the path.
        later: number of values at the end of the path.
    """

    initial: int
    later: int


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds of the statistics. A client is flagged if its path exceeds both ``rho_later`` and ``rho_quie``.

    Args:
        rho_later: ratio of the mean ``|GradIP|`` in the initial window to that in the later window.
        rho_quie: share of quiet steps in the later window, in [0, 1].
        sigma: value of ``|GradIP|`` below which a step is quiet.
    """

    rho_later: float
    rho_quie: float
    sigma: float


@dataclass(frozen=True, kw_only=True)
class PathStatistics:
    """Statistics of one path.

    Args:
        rho_later: see ``Thresholds``.
        rho_quie: see ``Thresholds``.
    """

    rho_later: float
    rho_quie: float

    def exceeds(self, thresholds: Thresholds) -> bool:
        """Whether the path exceeds both thresholds, so that its client is extreme non-IID."""
        return self.rho_later > thresholds.rho_later and self.rho_quie > thresholds.rho_quie


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Result of the client selection.

    Args:
        stopped: ids of the clients that are stopped early, ascending.
        thresholds: the thresholds that were applied; None before the calibration.
        statistics: statistics of each client's path, by client id.
    """

    stopped: list[int] = field(default_factory=list)
    thresholds: Thresholds | None = None
    statistics: dict[int, PathStatistics] = field(default_factory=dict)


def path_statistics(gradip: Sequence[float], windows: Windows, sigma: float) -> PathStatistics:
    """Computes the statistics of one path.

    Args:
        gradip: GradIP of each query of the path.
        windows: the windows to compare.
        sigma: value of ``|GradIP|`` below which a step is quiet.

    Returns:
        The statistics. If GradIP is 0 in all of the later window, ``rho_later`` is infinite.
    """
    initial, later = _windows(gradip, windows)
    mean_later = statistics.fmean(later)
    return PathStatistics(
        rho_later=statistics.fmean(initial) / mean_later if mean_later else math.inf,
        rho_quie=sum(value < sigma for value in later) / len(later),
    )


def null_thresholds(paths: Sequence[Sequence[float]], windows: Windows) -> Thresholds:
    """Computes thresholds from null paths.

    Args:
        paths: GradIP of each null path, at least 3 paths.
        windows: the windows to compare.

    Raises:
        ValueError: if there are fewer than 3 paths.
        ConfigError: if GradIP is 0 in all of a window of a path, from which no threshold can be computed.
    """
    if len(paths) < 3:
        raise ValueError(f"thresholds need at least 3 null paths, got {len(paths)}")
    for i, path in enumerate(paths):
        if not all(any(window) for window in _windows(path, windows)):
            raise ConfigError(
                f"GradIP of null path {i} is 0 in all of its first {windows.initial} or last {windows.later} values; "
                f"increase eps, decrease lr, or set vp_rho_later, vp_rho_quie and vp_sigma"
            )
    pooled = sorted(value for path in paths for value in _windows(path, windows)[1])
    sigma = pooled[int(_QUIET * len(pooled))]
    null_statistics = [path_statistics(path, windows, sigma) for path in paths]
    ratios = [math.log(path.rho_later) for path in null_statistics]
    quiet = [path.rho_quie for path in null_statistics]
    return Thresholds(
        rho_later=math.exp(statistics.fmean(ratios) + _DEVIATIONS * statistics.stdev(ratios)),
        rho_quie=min(statistics.fmean(quiet) + _DEVIATIONS * statistics.stdev(quiet), 1 - 1 / windows.later),
        sigma=sigma,
    )


def client_thresholds(paths: Mapping[int, Sequence[float]], windows: Windows) -> Thresholds:
    """Computes thresholds from the clients' own paths; see the module.

    A client below the threshold of rho_later counts as IID. Sigma is the median of ``|GradIP|`` in the later steps of
    these clients, so that half of their steps are quiet.

    Args:
        paths: GradIP of each client's path, by client id.
        windows: the windows to compare.

    Raises:
        ConfigError: if there are fewer than 4 paths, or GradIP is 0 in all of a window of most of them.
    """
    if len(paths) < MIN_CLIENTS:
        raise ConfigError(
            f"thresholds from the clients' own paths need at least {MIN_CLIENTS} clients, the calibration has "
            f"{len(paths)}; use more clients, vp_null held-out, or give vp_rho_later, vp_rho_quie and vp_sigma"
        )
    by_client = [_windows(path, windows) for path in paths.values()]
    changing = [(initial, later) for initial, later in by_client if any(initial) and any(later)]
    if 2 * len(changing) <= len(by_client):
        raise ConfigError(
            f"GradIP is 0 in all of the first {windows.initial} or last {windows.later} values of "
            f"{len(by_client) - len(changing)} of {len(by_client)} clients; increase eps, decrease lr, or set "
            f"vp_rho_later, vp_rho_quie and vp_sigma"
        )
    ratios = [math.log(statistics.fmean(initial) / statistics.fmean(later)) for initial, later in changing]
    error = statistics.median(math.sqrt(sum(map(_relative_variance, both))) for both in changing)
    threshold = sorted(ratios)[(len(ratios) - 1) // 4] + _ERRORS * error
    of_iid = [later for ratio, (_, later) in zip(ratios, changing, strict=True) if ratio <= threshold]
    return Thresholds(
        rho_later=math.exp(threshold),
        rho_quie=min(0.5 + _ERRORS * 0.5 / math.sqrt(windows.later), 1 - 1 / windows.later),
        sigma=statistics.median(value for later in of_iid for value in later),
    )


def _relative_variance(window: Sequence[float]) -> float:
    """Variance of the mean ``|GradIP|`` of a window over its square; see the module."""
    return (1 - 2 / math.pi) * sum(value**2 for value in window) / sum(window) ** 2


def random_clients(clients: Sequence[int], count: int, seed: int) -> list[int]:
    """Chooses clients at random.

    Args:
        clients: ids to choose from.
        count: number of clients to choose.
        seed: seed of the choice, in [0, 2**64).

    Returns:
        The chosen ids, ascending.
    """
    chosen = stream.permutation(stream.derived_seed(seed, "stop"), len(clients))[:count]
    return sorted(clients[i] for i in chosen.tolist())


def _windows(gradip: Sequence[float], windows: Windows) -> tuple[list[float], list[float]]:
    """Returns ``|GradIP|`` in the initial and in the later window."""
    sizes = [abs(value) for value in gradip]
    if not 1 <= windows.initial <= len(sizes) or not 1 <= windows.later <= len(sizes):
        raise ValueError(
            f"the path has {len(sizes)} values, too few for windows of {windows.initial} and {windows.later}"
        )
    return sizes[: windows.initial], sizes[-windows.later :]


__all__ = [
    "MIN_CLIENTS",
    "NullPaths",
    "PathStatistics",
    "Selection",
    "Thresholds",
    "Windows",
    "client_thresholds",
    "null_thresholds",
    "path_statistics",
    "random_clients",
]
