"""Counts the bytes that a client of a 1B model sends and receives, from encoded messages and the model's shapes."""

from typing import Any

import numpy as np
import torch
from torch import nn

from ..fed.messages import HEADER_BYTES, TrainReply, TrainRequest
from . import shapes

MODEL = "llama-3.2-1b"
LORA_RANK, LORA_TARGETS = 8, ("q_proj", "v_proj")
DENSITY = 1e-3
_DAY = 86_400  # seconds
_BF16 = 2  # bytes per weight of the model and of the adapters


def elements() -> int:
    """Returns the number of weights of the model; tied weights count once."""
    return sum(p.numel() for p in _model().parameters())


def lora_elements() -> int:
    """Returns the number of weights of the LoRA adapters: ``r (in + out)`` per projection."""
    layers = [m for name, m in _model().named_modules() if name.endswith(LORA_TARGETS) and isinstance(m, nn.Linear)]
    return sum(LORA_RANK * (layer.in_features + layer.out_features) for layer in layers)


def message_bytes(values: int) -> tuple[int, int]:
    """Returns the sizes of a request that carries the last round, and of the reply to it, in bytes.

    Args:
        values: number of scalars per round.
    """
    scalars = np.ones(values, dtype=np.float32)
    request = TrainRequest(client=1, round=2, local_steps=values, first_round=1, scalars=scalars).encode()
    reply = TrainReply(client=1, round=1, local_steps=values, examples=1, loss=0.5, scalars=scalars).encode()
    return len(request), len(reply)


def per_day(seconds_a_round: float) -> dict[str, Any]:
    """Returns the bytes per day, both directions together, of a client that takes part in every round.

    Args:
        seconds_a_round: assumed duration of a round, the same for all methods.
    """
    rounds = _DAY / seconds_a_round
    bytes_per_round = {
        "scalars, T = 1": sum(message_bytes(1)),
        "scalars, T = 10": sum(message_bytes(10)),
        "LoRA": 2 * _BF16 * lora_elements(),
        "weights": 2 * _BF16 * elements(),
    }
    return {
        "seconds_a_round": seconds_a_round,
        "rounds": rounds,
        "bytes": {name: rounds * count for name, count in bytes_per_round.items()},
    }


def catching_up(values: int, seconds_a_round: float) -> dict[str, float]:
    """Returns the size of the request to a client that was away: with all scalars that it missed, or with the masters.

    Args:
        values: number of scalars per round.
        seconds_a_round: assumed duration of a round.

    Returns:
        Bytes with scalars after a day and after a week, bytes with masters, and the number of days after which the
        masters are smaller. ``Server.request`` sends them from then on.
    """
    masked = round(DENSITY * elements())
    rounds = _DAY / seconds_a_round
    return {
        "values": values,
        "seconds_a_round": seconds_a_round,
        "day": HEADER_BYTES + 4 * values * rounds,
        "week": HEADER_BYTES + 4 * values * 7 * rounds,
        "masters": HEADER_BYTES + 4 * masked,
        "days_until_masters": masked / values / rounds,
    }


def traffic_summary(seconds: tuple[float, ...] = (60.0, 1.0)) -> dict[str, Any]:
    """Returns all of the above, ready for JSON.

    Args:
        seconds: assumed durations of a round.
    """
    return {
        "model": MODEL,
        "elements": elements(),
        "lora_elements": lora_elements(),
        "per_day": [per_day(s) for s in seconds],
        "catching_up": [catching_up(values, s) for s in seconds for values in (1, 10)],
    }


def _model() -> nn.Module:
    return shapes.build(MODEL, torch.bfloat16, torch.device("meta"))


__all__ = ["MODEL", "catching_up", "elements", "lora_elements", "message_bytes", "per_day", "traffic_summary"]
