"""A node's rounds under Flower's own strategies: FedAvg, FedMedian, Krum, the privacy wrappers.

Such a strategy does not know this engine. To it, the model has T * queries parameters: the sum, over the rounds so
far, of each step's aggregated scalars. A node receives the sums ``A_r``, moves its model by ``A_r - A_(r-1)``, runs
the steps of round ``r``, and answers ``A_r + g``. So a client's update, as the strategy sees it, is the client's
scalars, and their aggregate reaches every model.
"""

import numpy as np

from ....engine.errors import ConfigError, NonFiniteLossError
from ...config.run_config import RunConfig
from ...methods import Stopping
from .local_run import LocalRun


def check_strategy_settings(config: RunConfig) -> None:
    """Raises ``ConfigError`` for settings that need this engine's own server."""
    recipe = config.method.recipe
    if recipe.sends_weights or recipe.stopping is not Stopping.NONE:
        raise ConfigError(
            f"method {config.method} needs this engine's own server; Flower's strategies aggregate scalars only"
        )
    if config.privacy.noise:
        raise ConfigError(
            "dp_noise needs this engine's own server; leave it out and use one of Flower's privacy wrappers instead"
        )
    if config.clients.per_round not in (0, config.clients.count):
        raise ConfigError(
            "under Flower's strategies every client takes part in every round; leave clients_per_round out"
        )


def aggregated_scalars(sums: np.ndarray) -> np.ndarray:
    """Aggregated scalars of all finished rounds: float32 [r - 1, T * queries].

    Args:
        sums: float64 [r, T * queries]; row ``r - 1`` is what the nodes receive at the beginning of round ``r``.
    """
    return np.diff(sums, axis=0).astype(np.float32)


def strategy_round(local_run: LocalRun, client_id: int, sums: np.ndarray) -> tuple[np.ndarray, float]:
    """Runs round r of a client.

    Args:
        local_run: the node's run; its model is not past round r.
        client_id: id of the client.
        sums: float64 [r, T * queries], the sums that the node received in rounds 1 to r.

    Returns:
        The sums to send, float64 [T * queries], unchanged where a step was skipped; and the mean loss.

    Raises:
        NonFiniteLossError: if every step was skipped.
    """
    config, replica, round = local_run.config, local_run.replica, len(sums)
    check_strategy_settings(config)
    replica.catch_up(1, aggregated_scalars(sums).reshape(-1))
    client = local_run.client(client_id)
    client.data.seek((round - 1) * config.local_steps)
    update, loss = client.train(round, config.local_steps)
    if loss is None:
        raise NonFiniteLossError(f"client {client_id} skipped every step of round {round}: no loss was finite")
    return sums[-1] + np.nan_to_num(update["scalars"].astype(np.float64), nan=0.0), loss


__all__ = ["aggregated_scalars", "check_strategy_settings", "strategy_round"]
