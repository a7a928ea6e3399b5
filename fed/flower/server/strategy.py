"""``start_strategy``: trains this engine's clients by one of Flower's own strategies; see ``node.strategy``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from ....engine import stream
from ....engine.lm.evaluation import evaluate
from ....engine.lm.models import LanguageModel
from ....engine.parameters import fingerprint
from ...config.run_config import RunConfig, make_config
from ...replica import Replica
from ...setup.data import TaskData, encode
from ...setup.mask import make_mask
from ...setup.model import load_language_model, resolved
from ...setup.server_and_clients import make_terms
from ..node.local_run import settings_for_nodes
from ..node.strategy import aggregated_scalars, check_strategy_settings
from ..records import RunDescription
from ..strategy_records import SCALARS
from .exchange import GridExchange


@dataclass(frozen=True, kw_only=True)
class StrategyResult:
    """Result of training by a strategy.

    Args:
        result: Flower's result. Its arrays are sums of scalars; its metrics are the clients' (``loss``) and those of
            the server's evaluation (the task's scores, ``loss``, ``nonfinite``).
        lm: the fine-tuned model; ``save_checkpoint`` saves it.
        weights: fingerprint of the fine-tuned model.
        scalars: float32 [rounds, T * queries], the aggregated scalars from which the model can be replayed.
    """

    result: Result
    lm: LanguageModel
    weights: str
    scalars: np.ndarray


class _ServerModel:
    """The server's own model, which is moved by the same scalars as the clients' models."""

    def __init__(self, config: RunConfig, replica: Replica, data: TaskData) -> None:
        self._config, self._replica, self._data = config, replica, data
        self._sums: list[np.ndarray] = []

    @property
    def scalars(self) -> np.ndarray:
        """Aggregated scalars of all rounds so far."""
        return aggregated_scalars(np.stack(self._sums))

    def __call__(self, round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower's ``evaluate_fn``: called before the first round and after each; evaluates in the rounds due."""
        self._sums.append(arrays[SCALARS].numpy().astype(np.float64))
        self._replica.catch_up(1, self.scalars.reshape(-1))
        every = self._config.evaluation.every
        is_due = round in (0, self._config.rounds) or (every and round % every == 0)
        if not is_due:
            return None
        evaluation = evaluate(self._replica.model, self._data.validation)
        return MetricRecord({**evaluation.scores, "loss": evaluation.loss, "nonfinite": evaluation.nonfinite})


def start_strategy(
    grid: Grid,
    strategy: Strategy,
    settings: Mapping[str, Any],
    log: Callable[[str], None],
    *,
    deadline: float = 600.0,
    wait: float = 600.0,
) -> StrategyResult:
    """Registers the nodes for a run, and trains them by a strategy.

    Args:
        grid: the ServerApp's Grid.
        strategy: a strategy that trains on every node in every round (``fraction_train=1``) and evaluates on none
            (``fraction_evaluate=0``): the server evaluates.
        settings: settings by name; see ``make_config``.
        log: called with each log line.
        deadline: seconds that the strategy waits for the answers of a round.
        wait: seconds to wait for all clients before the first round, in which they load their models.

    Raises:
        ConfigError: if the settings need this engine's own server.
        MeerkatError: for any other unsuitable input; ``TransportError`` if not all clients come.
    """
    config = resolved(make_config(settings))
    check_strategy_settings(config)
    lm = load_language_model(config)
    base, data = fingerprint(lm.model), encode(config, lm)
    mask = make_mask(config, lm, data.train)
    replica = Replica(lm.model, mask, make_terms(config, mask), config.model.backend)
    description = RunDescription(
        settings=settings_for_nodes(config),
        base=base,
        mask_digest=mask.digest,
        stream_version=stream.VERSION,
        mask=mask.to_bytes(),
        seconds=max(deadline, wait),
    )
    exchange = GridExchange(
        grid, lambda: description, deadline=deadline, at_least=config.clients.count, wait=wait, log=log
    )
    server_model = _ServerModel(config, replica, data)
    try:
        exchange.wait_for_nodes()
        result = strategy.start(
            grid,
            ArrayRecord({SCALARS: Array(np.zeros(replica.terms.scalars_per_round))}),
            num_rounds=config.rounds,
            timeout=deadline,
            evaluate_fn=server_model,
        )
    finally:
        exchange.release_nodes()
    return StrategyResult(result=result, lm=lm, weights=fingerprint(lm.model), scalars=server_model.scalars)


__all__ = ["StrategyResult", "start_strategy"]
