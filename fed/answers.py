"""``Answers``: the accepted answers of a round."""

import numpy as np

from .aggregation import Weighting, client_weights, sum_in_order
from .messages import TrainReply
from .scalars import ClientScalars


class Answers:
    """The accepted answers of a round.

    Attributes:
        values: by client, the bytes of its fp32 values: scalars or masters. Python's garbage collector would walk a
            hundred thousand arrays.
    """

    def __init__(self) -> None:
        self.values: dict[int, bytes] = {}
        self._losses: dict[int, float | None] = {}

    def add(self, reply: TrainReply) -> None:
        """Adds a client's reply."""
        values = reply.masters if reply.scalars is None else reply.scalars
        assert values is not None
        self._losses[reply.client] = reply.loss
        self.values[reply.client] = values.tobytes()  # last: with this line, the answer is accepted

    def scalars(self) -> ClientScalars:
        """The clients' scalars."""
        return ClientScalars.from_bytes(self.values)

    def masters(self) -> dict[int, np.ndarray]:
        """The clients' masters, float32 [k] each."""
        return {i: np.frombuffer(data, dtype=np.float32) for i, data in self.values.items()}

    def mean_loss(self, examples: dict[int, int], weighting: Weighting) -> float | None:
        """Mean training loss of the clients that reported one, weighted by ``p_i``; None if no client did.

        Args:
            examples: number of examples by client.
            weighting: the weighting of the clients.
        """
        losses = {i: loss for i in self.values if (loss := self._losses[i]) is not None}
        if not losses:
            return None
        weights = client_weights({i: examples[i] for i in losses}, weighting)
        return float(sum_in_order(np.array([p * losses[i] for i, p in weights.items()])))


__all__ = ["Answers"]
