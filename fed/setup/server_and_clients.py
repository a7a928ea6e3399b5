"""``Federation``: server and clients of a run around one model, as the settings and the method's recipe say."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ...engine import stream
from ...engine.errors import ConfigError, NonFiniteLossError
from ...engine.lm.examples import EncodedTask
from ...engine.lm.objective import MicroBatchMap
from ...engine.mask import SparseMask
from ...engine.weights import MaskedWeights
from ..attack import with_attackers
from ..client import Client, ClientData, Timing
from ..config.run_config import RunConfig
from ..gradip import GradIP, Trace
from ..ledger.file import LedgerWriter, RoundRecord
from ..methods import Stopping
from ..privacy import Privacy
from ..replica import Replica
from ..selection import Selection, Thresholds, null_thresholds, path_statistics, random_clients
from ..server import RoundResult, Server
from ..terms import CALIBRATION, Terms
from .data import TaskData

# Share of the masked elements that may stand still without a word. In float32 it is 0 at usual scales.
_WORTH_TELLING = 0.01


def make_terms(config: RunConfig, mask: SparseMask) -> Terms:
    """The terms that the settings come to."""
    recipe = config.method.recipe
    return Terms.of(
        mask,
        seed=config.seed,
        eps=config.step.eps,
        lr=config.step.lr,
        local_steps=config.local_steps,
        queries=config.step.queries,
        gradient=recipe.gradient,
        schedule=config.step.schedule,
        rounds=config.rounds,
        calibration_steps=0 if recipe.stopping is Stopping.NONE else config.selection.steps,
        privacy=config.private_terms(),
    )


def check_selection(config: RunConfig, mask: SparseMask, data: TaskData) -> None:
    """Raises ``MeerkatError`` if the method stops clients early and lacks what that needs, before anything begins."""
    if config.method.recipe.stopping is Stopping.NONE:
        return
    GradIP(mask, torch.device("cpu"), "torch")
    if config.selection.thresholds() is None and len(data.validation) < config.step.batch_size:
        raise ConfigError(
            f"{len(data.validation)} held-out examples are too few for the null distribution (a batch holds "
            f"{config.step.batch_size}); give vp_rho_later, vp_rho_quie and vp_sigma"
        )


def check_perturbation(config: RunConfig, model: nn.Module, mask: SparseMask) -> str | None:
    """What is to be said of a perturbation that the weights' precision rounds away in part; None where it is little.

    Raises:
        ConfigError: if it moves none of the masked elements.
    """
    if config.method.recipe.sends_weights:
        return None
    unchanged_fraction = MaskedWeights(model, mask, config.model.backend).unchanged_fraction(
        stream.step_seed(config.seed, 1, 0), config.step.eps
    )
    what = f"{unchanged_fraction:.1%} of the masked elements do not move at eps {config.step.eps:g}"
    if unchanged_fraction == 1:
        raise ConfigError(f"{what}: {config.model.dtype} rounds the perturbation away; raise eps, or take float32")
    return f"{config.model.dtype}: {what}" if unchanged_fraction > _WORTH_TELLING else None


class Federation:
    """Server and clients of a run; all share one replica.

    Args:
        config: the settings.
        model: the base model.
        mask: of the model.
        data: of the task.
        shares: of each client, the indices of its training examples; none where the clients are elsewhere.
        ledger: an open ledger, or None to keep none.
        micro_batch_map: computes the micro-batches of a step, where several processes share a client; None: this one.

    Attributes:
        clients: in the order of their ids.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        mask: SparseMask,
        data: TaskData,
        shares: list[Tensor],
        ledger: LedgerWriter | None,
        micro_batch_map: MicroBatchMap | None = None,
    ) -> None:
        self.config, self.model, self.data = config, model, data
        self.timing, self.selection = Timing(), Selection()
        self._windows = config.selection.windows(config.step.queries)
        self._replica = Replica(model, mask, make_terms(config, mask), config.model.backend)
        by_scalars = not self._replica.terms.sends_weights
        self._gradip = None
        if self._replica.terms.calibration_steps or (by_scalars and mask.gradient is not None):
            self._gradip = GradIP(mask, next(model.parameters()).device, config.model.backend)
        privacy = self._replica.terms.privacy
        honest = [
            self._client(i, data.train, share, "data", privacy, micro_batch_map) for i, share in enumerate(shares)
        ]
        self.clients = with_attackers(honest, config.attack.kind, config.attack.clients)
        self.server = Server(
            list(range(config.clients.count)),
            self._replica,
            ledger,
            config.aggregation.build(),
            per_round=config.clients.per_round or None,
            gradip=self._gradip,
            select=self._select,
            max_scalar=config.aggregation.max_scalar,
            max_examples=config.aggregation.max_examples,
        )

    def _client(
        self,
        id: int,
        data: EncodedTask,
        indices: Tensor,
        purpose: str,
        privacy: Privacy | None = None,
        micro_batch_map: MicroBatchMap | None = None,
    ) -> Client:
        config = self.config
        seed = stream.derived_seed(config.seed, purpose, id)
        noise = None if privacy is None else stream.derived_seed(config.seed, "priv", id)
        examples = ClientData(
            data, indices, config.step.batch_size, seed, config.step.micro_batch_size, poisson=privacy is not None
        )
        return Client(id, examples, self._replica, config.step.objective, self.timing, privacy, noise, micro_batch_map)

    def restore(self, line: RoundRecord, *, weights: bool = True, traced: bool = True) -> RoundResult:
        """Takes over the round that is under way from a ledger; see ``Server.restore``."""
        result = self.server.restore(line, weights=weights, traced=traced)
        if line.round == CALIBRATION and line.thresholds is not None:
            self.selection = self._judged(result.traces, line.thresholds, line.stopped)
        return result

    def _select(self, traces: Mapping[int, Trace]) -> Selection:
        config = self.config
        thresholds = config.selection.thresholds() or null_thresholds(self._null_paths(), self._windows)
        self.selection = self._judged(traces, thresholds)
        return self.selection

    def _judged(
        self, traces: Mapping[int, Trace], thresholds: Thresholds, stopped: list[int] | None = None
    ) -> Selection:
        """Who is stopped early by these thresholds, where that is not known yet."""
        windows = self._windows
        statistics = {i: path_statistics(trace.gradip, windows, thresholds.sigma) for i, trace in traces.items()}
        if stopped is None:
            stopped = [i for i, each in statistics.items() if each.exceed(thresholds)]
            if self.config.method.recipe.stopping is Stopping.RANDOM:
                stopped = random_clients(sorted(traces), len(stopped), self.config.seed)
        return Selection(stopped=sorted(stopped), thresholds=thresholds, statistics=statistics)

    def _null_paths(self) -> list[list[float]]:
        """GradIP of the paths of IID clients on examples of the server's own: the held-out ones."""
        assert self._gradip is not None
        held_out, terms = self.data.validation, self._replica.terms
        everything = torch.arange(len(held_out))
        scalars = {}
        for i in range(self.config.selection.null_paths):
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


__all__ = ["Federation", "check_perturbation", "check_selection", "make_terms"]
