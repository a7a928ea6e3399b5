"""``start_strategy``: a run of one of Flower's own strategies over this engine's clients; see ``stock``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from ....engine.lm.evaluation import evaluate
from ....engine.lm.models import LanguageModel
from ....engine.parameters import fingerprint
from ...config.run_config import RunConfig, make_config
from ...replica import Replica
from ...setup.data import TaskData, encode
from ...setup.mask import make_mask
from ...setup.model import load_language_model
from ...setup.server_and_clients import make_terms
from ..node.local_run import settings_for_nodes
from ..node.strategy import check_strategy_settings, moves
from ..records import RunDescription
from ..strategy_records import SCALARS
from .exchange import GridExchange


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a strategy came to.

    Args:
        result: what the strategy returned: its arrays are sums of scalars, its metrics those of the clients (``loss``)
            and the server's evaluation (``accuracy``, ``loss``).
        lm: the fine-tuned model; ``save_checkpoint`` saves it.
        weights: fingerprint of it.
        scalars: float32 [rounds, T * queries], what moved it.
    """

    result: Result
    lm: LanguageModel
    weights: str
    scalars: np.ndarray


class _ServerModel:
    """The server's own model, moved on as the clients' are."""

    def __init__(self, config: RunConfig, replica: Replica, data: TaskData) -> None:
        self._config, self._replica, self._data = config, replica, data
        self._sums: list[np.ndarray] = []

    @property
    def scalars(self) -> np.ndarray:
        return moves(np.stack(self._sums))

    def __call__(self, round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """As Flower's ``evaluate_fn``: called before the first round, and after each."""
        self._sums.append(arrays[SCALARS].numpy().astype(np.float64))
        self._replica.catch_up(1, self.scalars.reshape(-1))
        every = self._config.evaluation.every
        if round not in (0, self._config.rounds) and not (every and round % every == 0):
            return None
        found = evaluate(self._replica.model, self._data.validation)
        return MetricRecord({"accuracy": found.accuracy, "loss": found.loss})


def start_strategy(
    grid: Grid,
    strategy: Strategy,
    settings: Mapping[str, Any],
    log: Callable[[str], None],
    *,
    deadline: float = 600.0,
    wait: float = 600.0,
) -> Trained:
    """Tells the nodes of a run, and starts the strategy on it.

    Args:
        grid: of the ServerApp.
        strategy: one that asks every node in every round (``fraction_train=1``) and evaluates on none
            (``fraction_evaluate=0``): the server evaluates.
        settings: by name, as ``make_config`` takes them.
        log: called with lines for people.
        deadline: seconds that the strategy waits for the answers of a round.
        wait: seconds that all clients are waited for before the first round, in which they load their models.

    Raises:
        ConfigError: if the settings need this engine's own server.
        MeerkatError: for any other input that does not fit; ``TransportError`` if not all clients come.
    """
    config = make_config(settings)
    check_strategy_settings(config)
    lm = load_language_model(config)
    base, data = fingerprint(lm.model), encode(config, lm.tokenizer)
    mask = make_mask(config, lm, data.train)
    replica = Replica(lm.model, mask, make_terms(config, mask), config.model.backend)
    setup = RunDescription(
        settings=settings_for_nodes(config.flat()),
        base=base,
        mask_digest=mask.digest,
        mask=mask.to_bytes(),
        seconds=max(deadline, wait),
    )
    nodes = GridExchange(grid, lambda: setup, deadline=deadline, at_least=config.clients.count, wait=wait, log=log)
    follower = _ServerModel(config, replica, data)
    try:
        nodes.gather()
        result = strategy.start(
            grid,
            ArrayRecord({SCALARS: Array(np.zeros(replica.terms.values))}),
            num_rounds=config.rounds,
            timeout=deadline,
            evaluate_fn=follower,
        )
    finally:
        nodes.dismiss()
    return Trained(result=result, lm=lm, weights=fingerprint(lm.model), scalars=follower.scalars)


__all__ = ["Trained", "start_strategy"]
