"""``Inputs``: model, examples and mask of a run, and what is checked about them before anything is written."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...engine.backend import resolve
from ...engine.lm.models import LanguageModel, check_device
from ...engine.lm.quantize import describe_frozen
from ...engine.lm.text_metrics import check_metrics
from ...engine.mask import SparseMask
from ...engine.parameters import fingerprint
from ..config.run_config import RunConfig
from ..partition import label_counts
from ..privacy import largest_epsilon
from ..setup.data import TaskData, client_shares, describe_examples, encode
from ..setup.mask import make_mask
from ..setup.model import load_language_model, slow_dtype
from ..setup.pool import ClientPool
from ..setup.server_and_clients import check_perturbation, check_selection, make_terms
from .rounds import Log
from .shared import Shared


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of a run, except the mask.

    Args:
        config: the settings.
        lm: the base model and its tokenizer.
        data: the task's examples.
        shares: indices of each client's training examples; empty if the clients are on other machines.
        base: fingerprint of the base model.
        pool: the clients.
        shared: what was loaded for several runs; None: nothing.
    """

    config: RunConfig
    lm: LanguageModel
    data: TaskData
    shares: list[Tensor]
    base: str
    pool: ClientPool
    shared: Shared | None

    def choose_mask(self, log: Log) -> SparseMask:
        """The run's mask; see ``make_mask``."""
        if self.shared is not None:
            return self.shared.mask
        log(f"choosing the mask ({self.config.mask.file or self.config.method.recipe.elements})")
        return make_mask(self.config, self.lm, self.data.train)

    @property
    def data_digest(self) -> str:
        """SHA-256 of the examples and of their partition."""
        return self.data.digest(self.shares)

    @property
    def label_counts(self) -> list[list[int]]:
        """Number of training examples by client and label, [K][C]."""
        return label_counts(self.data.train.labels, self.shares, max(1, len(self.data.train.class_names)))

    @property
    def natural_client_names(self) -> list[Any]:
        """Names of the natural clients in the data, in the order of their ids; empty for other partitions."""
        return sorted(set(self.data.groups or ()))

    def partition_summary(self) -> dict[str, Any]:
        """Fields of the summary about the partition; for more than 100 clients, only their number."""
        clients = self.config.clients
        short, number = len(self.shares) <= 100, f"{len(self.shares)} clients"
        summary: dict[str, Any] = {
            "partition": clients.partition.describe(clients.alpha),
            "examples_by_client_and_label": self.label_counts if short else number,
        }
        if self.natural_client_names:
            summary["natural_clients"] = self.natural_client_names if short else number
        return summary


def load_inputs(
    config: RunConfig, log: Log, trust_remote_code: bool, pool: ClientPool, shared: Shared | None
) -> Inputs:
    """Loads model and examples, partitions these among the clients, and logs what was loaded.

    Args:
        config: the settings, resolved.
        log: called with one line before each slow preparation, and with lines about the data.
        trust_remote_code: see ``models.load_model``.
        pool: the clients.
        shared: what was loaded for several runs; None: load it.
    """
    check_metrics(config.evaluation.metrics)
    for line in pool.prepare(config):
        log(line)
    if config.model.backend != "auto":  # raises for a backend that does not fit, before slow work
        resolve(config.model.backend, check_device(config.model.device))
    log(f"loading the model {config.model.source} and the task {config.task.name}")
    slow = slow_dtype(config)
    if slow is not None:
        log(slow)
    log(
        f"{config.method}: {config.rounds} rounds of {config.local_steps} local steps, learning rate {config.step.lr:g}"
    )
    lm = load_language_model(config, trust_remote_code=trust_remote_code) if shared is None else shared.lm
    kept = describe_frozen(lm.model)
    if kept is not None:
        log(kept)
    data = encode(config, lm) if shared is None else shared.data
    shares = client_shares(config, data) if pool.simulated else []
    base = fingerprint(lm.model)
    if shared is not None:
        shared.check(base)
    inputs = Inputs(config=config, lm=lm, data=data, shares=shares, base=base, pool=pool, shared=shared)
    pool.check(base, inputs.data_digest, data.train.layout)
    for line in describe_examples(data.train, data.validation):
        log(line)
    for i, counts in enumerate(inputs.label_counts[:8]):
        name = f" ({inputs.natural_client_names[i]})" if inputs.natural_client_names else ""
        by_label = f", {counts} by label" if data.train.class_names else ""
        log(f"client {i}{name}: {sum(counts)} examples{by_label}")
    if len(shares) > 8:
        log(f"... {config.clients.count - 8} more clients; `meerkat-engine report` shows all")
    return inputs


def check_before_start(inputs: Inputs, mask: SparseMask, log: Log) -> None:
    """Finds errors that would stop the run later, before anything is written; raises ``MeerkatError``."""
    check_selection(inputs.config, mask, inputs.data)
    warning = check_perturbation(inputs.config, inputs.lm.model, mask)
    if warning is not None:
        log(warning)
    terms = make_terms(inputs.config, mask)
    if terms.privacy is not None and inputs.shares:
        steps = terms.calibration_steps + inputs.config.rounds * terms.local_steps
        final_epsilon = largest_epsilon(terms.privacy, {(len(share), steps) for share in inputs.shares}, terms.queries)
        log(
            f"differential privacy: epsilon {final_epsilon:.3g} at delta {terms.privacy.delta:g} at most, after all "
            f"rounds (simulated: the noise follows from the seed)"
        )


__all__ = ["Inputs", "check_before_start", "load_inputs"]
