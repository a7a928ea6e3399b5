"""A node's rounds under strategies that know nothing of this engine: FedAvg, FedMedian, Krum, the privacy wrappers.

To them, the model has T * queries parameters: the sum, over the rounds so far, of each step's aggregated scalars. A
node is sent the sums ``A_r``, moves its model on by ``A_r - A_(r-1)``, takes round ``r``'s steps, and answers
``A_r + g``. So what a strategy takes for a client's update is its scalars, and what it makes of them reaches every
model.
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
            f"{config.method} needs this engine's own server; a strategy of Flower's aggregates scalars only"
        )
    if config.privacy.noise:
        raise ConfigError(
            "dp_noise needs this engine's own server; leave it out and wrap the strategy, or the other way"
        )
    if config.clients.per_round not in (0, config.clients.count):
        raise ConfigError(
            "every client takes part in every round under a strategy of Flower's; leave clients_per_round out"
        )


def moves(sums: np.ndarray) -> np.ndarray:
    """Aggregated scalars of all rounds but the one that begins: float32 [r - 1, T * queries] of float64 [r, ...]."""
    return np.diff(sums, axis=0).astype(np.float32)


def strategy_round(participant: LocalRun, client: int, sums: np.ndarray) -> tuple[np.ndarray, float]:
    """A node's answer.

    Args:
        participant: the node's, its model not past round r.
        client: id.
        sums: float64 [r, T * queries], what came down in rounds 1 to r.

    Returns:
        What goes up, float64 [T * queries], where a step that was not taken is the sum that came down; and the mean
        loss.

    Raises:
        NonFiniteLossError: if no step was taken.
    """
    config, replica, round = participant.config, participant.replica, len(sums)
    check_strategy_settings(config)
    replica.catch_up(1, moves(sums).reshape(-1))
    one = participant.client(client)
    one.data.seek((round - 1) * config.local_steps)
    found, loss = one.train(round, config.local_steps)
    if loss is None:
        raise NonFiniteLossError(f"client {client} took no step of round {round}: no loss was finite")
    return sums[-1] + np.nan_to_num(found["scalars"].astype(np.float64), nan=0.0), loss


__all__ = ["check_strategy_settings", "moves", "strategy_round"]
