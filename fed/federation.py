"""``Federation``: server and clients of a run around one model, as the settings and the method's recipe say."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from .. import stream
from ..errors import ConfigError, NonFiniteLossError
from ..examples import EncodedTask
from ..mask import SparseMask
from .client import Client, ClientData, Timing
from .config import RunConfig
from .gradip import GradIP, Trace
from .ledger import LedgerWriter
from .methods import Gradient, Stopping
from .replica import Replica
from .selection import Statistics, Thresholds, Windows, at_random, null_thresholds, path_statistics
from .server import Server
from .setup import TaskData
from .terms import CALIBRATION, Terms


def terms_of(config: RunConfig, mask: SparseMask) -> Terms:
    """The terms that the settings come to."""
    recipe = config.method.recipe
    return Terms.of(
        mask,
        seed=config.seed,
        eps=config.eps,
        lr=config.lr,
        local_steps=config.local_steps,
        queries=config.queries,
        gradient=recipe.gradient,
        schedule=config.schedule,
        rounds=config.rounds,
        calibration_steps=0 if recipe.stopping is Stopping.NONE else config.vp_steps,
    )


def check_selection(config: RunConfig, mask: SparseMask, data: TaskData) -> None:
    """Raises ``MeerkatError`` if the method stops clients early and lacks what that needs, before anything begins."""
    if config.method.recipe.stopping is Stopping.NONE:
        return
    GradIP(mask, torch.device("cpu"), "torch")
    if config.vp_thresholds() is None and len(data.validation) < config.batch_size:
        raise ConfigError(
            f"{len(data.validation)} held-out examples are too few for the null distribution (a batch holds "
            f"{config.batch_size}); give vp_rho_later, vp_rho_quie and vp_sigma"
        )


@dataclass
class Selection:
    """Who is stopped early, and why: filled when the calibration is over."""

    thresholds: Thresholds | None = None
    statistics: dict[int, Statistics] = field(default_factory=dict)
    stopped: list[int] = field(default_factory=list)


class Federation:
    """Server and clients of a run; all share one replica.

    Args:
        config: the settings.
        model: the base model.
        mask: of the model.
        data: of the task.
        shares: of each client, the indices of its training examples.
        ledger: an open ledger.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        mask: SparseMask,
        data: TaskData,
        shares: list[Tensor],
        ledger: LedgerWriter,
    ) -> None:
        self.config, self.model, self.data = config, model, data
        self.timing, self.selection = Timing(), Selection()
        self._replica = Replica(model, mask, terms_of(config, mask), config.backend)
        by_scalars = self._replica.terms.gradient is not Gradient.BACKPROPAGATION
        self._gradip = None
        if self._replica.terms.calibration_steps or (by_scalars and mask.gradient is not None):
            self._gradip = GradIP(mask, next(model.parameters()).device, config.backend)
        self.clients = [self._client(i, data.train, share, "data") for i, share in enumerate(shares)]
        self.server = Server(
            list(range(config.clients)),
            self._replica,
            ledger,
            config.weighting,
            per_round=config.clients_per_round or None,
            gradip=self._gradip,
            select=self._select,
        )

    def _client(self, id: int, data: EncodedTask, indices: Tensor, purpose: str) -> Client:
        config = self.config
        seed = stream.derived_seed(config.seed, purpose, id)
        examples = ClientData(data, indices, config.batch_size, seed, config.micro_batch_size)
        return Client(id, examples, self._replica, config.objective, self.timing)

    def _select(self, traces: dict[int, Trace]) -> Sequence[int]:
        config, found = self.config, self.selection
        windows = Windows(initial=config.vp_initial * config.queries, later=config.vp_later * config.queries)
        found.thresholds = config.vp_thresholds() or null_thresholds(self._null_paths(), windows)
        found.statistics = {
            i: path_statistics(trace.gradip, windows, found.thresholds.sigma) for i, trace in traces.items()
        }
        extreme = [i for i, each in found.statistics.items() if each.exceed(found.thresholds)]
        if config.method.recipe.stopping is Stopping.RANDOM:
            extreme = at_random(sorted(traces), len(extreme), config.seed)
        found.stopped = sorted(extreme)
        return found.stopped

    def _null_paths(self) -> list[list[float]]:
        """GradIP of the paths of IID clients on examples of the server's own: the held-out ones."""
        assert self._gradip is not None
        held_out, terms = self.data.validation, self._replica.terms
        everything = torch.arange(len(held_out))
        scalars = {}
        for i in range(self.config.vp_null_paths):
            client = self._client(i, held_out, everything, "null")
            found, _ = client.train(CALIBRATION, terms.calibration_steps)
            if not np.isfinite(found["scalars"]).all():
                step = int(np.flatnonzero(~np.isfinite(found["scalars"]))[0]) // terms.queries
                raise NonFiniteLossError(
                    f"null path {i}, on held-out examples: step {step} was not taken, since a loss or lr * g was not "
                    f"finite; thresholds need all steps (try a smaller lr or eps)"
                )
            scalars[i] = found["scalars"].tolist()
        return [trace.gradip for trace in self._gradip.traces(terms.seeds(CALIBRATION), scalars).values()]


__all__ = ["Federation", "Selection", "check_selection", "terms_of"]
