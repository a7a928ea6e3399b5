"""``Federation``: server and clients of a run on one model, built from the settings and the method's recipe."""

import torch
from torch import Tensor, nn

from ...engine import stream
from ...engine.captured import Capture
from ...engine.errors import ConfigError
from ...engine.lm.layout import Layout
from ...engine.lm.objective import MicroBatchMap
from ...engine.mask import SparseMask
from ...engine.weights import MaskedWeights
from ..attack import with_attackers
from ..client import Timing
from ..config.run_config import RunConfig
from ..gradip import GradIP
from ..ledger.file import LedgerWriter, RoundRecord
from ..methods import Stopping
from ..replica import Replica
from ..selection import NullPaths, Selection
from ..server import RoundResult, Server
from ..terms import CALIBRATION, Terms
from .data import TaskData
from .selector import ClientMaker, Selector

# A run warns if the perturbation leaves more than this share of the masked elements unchanged. In float32 the share is
# 0 at usual scales.
_UNCHANGED_WARNING = 0.01


def make_terms(config: RunConfig, mask: SparseMask) -> Terms:
    """The terms that follow from settings and mask."""
    recipe = config.method.recipe
    return Terms.for_mask(
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
    """Checks, before a run starts, that a method which stops clients early has what it needs.

    Raises:
        MaskError: if the mask has no gradient.
        ConfigError: if there are too few held-out examples for null paths on them, and no thresholds are given.
    """
    if config.method.recipe.stopping is Stopping.NONE:
        return
    GradIP(mask, torch.device("cpu"), "torch")  # raises MaskError if the mask has no gradient
    runs_null_paths = config.selection.thresholds() is None and config.selection.null is NullPaths.HELD_OUT
    if runs_null_paths and len(data.validation) < config.step.batch_size:
        raise ConfigError(
            f"{len(data.validation)} held-out examples are too few for null paths (a batch holds "
            f"{config.step.batch_size}); use more held-out examples or vp_null clients, or give vp_rho_later, "
            f"vp_rho_quie and vp_sigma"
        )


def check_perturbation(config: RunConfig, model: nn.Module, mask: SparseMask) -> str | None:
    """Measures the share of masked elements that the perturbation leaves unchanged, as their dtype rounds it away.

    Returns:
        A warning for the log if the share is above 1%, else None.

    Raises:
        ConfigError: if the perturbation changes none of the masked elements.
    """
    if config.method.recipe.sends_weights:
        return None
    unchanged_fraction = MaskedWeights(model, mask, config.model.backend).unchanged_fraction(
        stream.step_seed(config.seed, 1, 0), config.step.eps
    )
    finding = (
        f"the perturbation leaves {unchanged_fraction:.1%} of the masked elements unchanged at eps {config.step.eps:g}"
    )
    if unchanged_fraction == 1:
        raise ConfigError(f"{finding}: {config.model.dtype} rounds it away; raise eps, or use dtype float32")
    return f"{config.model.dtype}: {finding}" if unchanged_fraction > _UNCHANGED_WARNING else None


class Federation:
    """Server and clients of a run. All share one replica.

    Args:
        config: the settings.
        model: the base model.
        mask: a mask of the model.
        data: the task's examples.
        shares: indices of each client's training examples; empty if the clients are on other machines.
        ledger: an open ledger, or None to write none.
        micro_batch_map: computes the micro-batches of a step if several processes share a client; None: this process
            computes all.

    Attributes:
        config: the settings.
        model: the model, at the server's round.
        data: the task's examples.
        timing: times of the steps so far.
        clients: the clients, in the order of their ids.
        server: the server.
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
        self.timing = Timing()
        self._shares_clients = micro_batch_map is not None
        terms = make_terms(config, mask)
        self._replica = Replica(model, mask, terms, config.model.backend, config.model.capture, config.step.points)
        self._gradip = None
        if terms.calibration_steps or (not terms.sends_weights and mask.gradient is not None):
            self._gradip = GradIP(mask, next(model.parameters()).device, config.model.backend)
        make = ClientMaker(config, self._replica, self.timing)
        # The server holds the selector, not this object: so it is freed at once, and the masters with it.
        self._selector = Selector(make, self._gradip, data.validation)
        honest_clients = [
            make.client(i, data.train, share, "data", terms.privacy, micro_batch_map) for i, share in enumerate(shares)
        ]
        self.clients = with_attackers(honest_clients, config.attack.kind, config.attack.clients)
        self.server = Server(
            list(range(config.clients.count)),
            self._replica,
            ledger,
            config.aggregation.build(),
            per_round=config.clients.per_round or None,
            gradip=self._gradip,
            select=self._selector.select,
            max_scalar=config.aggregation.max_scalar,
            max_examples=config.aggregation.max_examples,
        )

    @property
    def selection(self) -> Selection:
        """Clients that are stopped early; empty before the calibration."""
        return self._selector.selection

    def how_steps_run(self) -> str | None:
        """A line for the log: why the points of a step are not computed together, or whether steps are CUDA graphs.

        None if there is nothing to say: on a CPU, or before the first step.
        """
        optimizer = self._replica.optimizer
        if optimizer.not_together is not None:
            return optimizer.not_together
        if optimizer.weights.values.device.type != "cuda" or not self.timing.steps:
            return None
        if optimizer.captured_steps:
            return "local steps are replayed from CUDA graphs, which are recorded for each shape of a batch"
        terms = self._replica.terms
        reasons = {
            "--capture is off": self.config.model.capture is Capture.OFF,
            f"{self.config.method} trains by backpropagation": terms.sends_weights,
            "private steps draw new noise in every forward pass": terms.privacy is not None,
            "several processes share a client": self._shares_clients,
            f"hardly two {self.data.train.layout} batches have the same shape": self.data.train.layout != Layout.PACKED,
        }
        reason = next((reason for reason, holds in reasons.items() if holds), optimizer.not_captured)
        return f"local steps are not CUDA graphs: {reason or 'no shape of a batch has come twice yet'}"

    def restore(self, record: RoundRecord, *, update_model: bool = True, compute_traces: bool = True) -> RoundResult:
        """Applies the current round from its ledger line instead of asking the clients; see ``Server.restore``."""
        result = self.server.restore(record, update_model=update_model, compute_traces=compute_traces)
        if record.round == CALIBRATION and record.thresholds is not None:
            self._selector.select_by(record.thresholds, result.traces, record.stopped)
        return result


__all__ = ["Federation", "check_perturbation", "check_selection", "make_terms"]
