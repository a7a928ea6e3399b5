"""``Replica``: a copy of the model at a known round, updated by aggregated scalars."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..engine.errors import MaskError, MessageError
from ..engine.estimator import Estimator, NonFinite
from ..engine.mask import SparseMask
from ..engine.optimizer import SparseZO
from .methods import Gradient
from .terms import Terms


class Replica:
    """A model at the beginning of a round.

    In a deployment, the server and every client have a replica each. In a simulation they all share one: between
    rounds, the masked weights are a client's only model state, and they are the same for all clients.

    Args:
        model: the base model; its masked weights are changed in place.
        mask: the mask with the digest in ``terms``, made for this model.
        terms: the federation's terms.
        backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.

    Attributes:
        model: the model.
        terms: the federation's terms.
        optimizer: the optimizer of the local steps, on the model's masked weights.
        round: the round at whose beginning the model is, from 1.

    Raises:
        MaskError: if the mask has another digest than the terms', or does not fit the model.
    """

    def __init__(self, model: nn.Module, mask: SparseMask, terms: Terms, backend: str = "auto") -> None:
        if mask.digest != terms.mask_digest:
            raise MaskError(f"the mask has digest {mask.digest[:12]}, the federation uses {terms.mask_digest[:12]}")
        self.model = model
        self.terms = terms
        forward_difference = terms.gradient is Gradient.FORWARD_DIFFERENCE
        self.optimizer = SparseZO(
            model,
            mask,
            lr=terms.lr,
            eps=terms.eps,
            seed=terms.seed,
            backend=backend,
            queries=terms.queries,
            estimator=Estimator.FORWARD_DIFFERENCE if forward_difference else Estimator.TWO_POINT,
            nonfinite=NonFinite.SKIP,  # a bad batch of one client must not stop the others
        )
        self.round = 1

    def apply_rounds(self, scalars: Sequence[Sequence[float]]) -> None:
        """Applies the updates of some rounds in one pass over the weights.

        Args:
            scalars: aggregated scalars of consecutive rounds, from the replica's round on: [rounds][T q].
        """
        seeds, coefficients = [], []
        for row in scalars:
            for seed, lr, g in self.terms.updates(self.round, row):
                seeds.append(seed)
                coefficients.append(lr * g)
            self.round += 1
        self.optimizer.weights.replay_(seeds, coefficients)

    def catch_up(self, first_round: int, scalars: np.ndarray) -> None:
        """Applies those of some rounds that this replica has not applied yet.

        Args:
            first_round: round of the first scalar, at most the replica's round.
            scalars: aggregated scalars, float32 [rounds * T q].

        Raises:
            MessageError: if the scalars begin after the replica's round, are not those of complete rounds, or are not
                finite.
        """
        values = self.terms.scalars_per_round
        if len(scalars) % values:
            raise MessageError(f"got {len(scalars)} scalars, a multiple of {values} (one round) was expected")
        if first_round > self.round:
            raise MessageError(f"the scalars begin at round {first_round}, this client is at round {self.round}")
        if not np.isfinite(scalars).all():
            raise MessageError("an aggregated scalar is not finite")
        self.apply_rounds(scalars.reshape(-1, values)[self.round - first_round :].tolist())

    def load_masters(self, round: int, masters: np.ndarray) -> None:
        """Sets the masked weights and the round.

        Args:
            round: the round at whose beginning the weights are.
            masters: fp32 values of the masked weights, float32 [k].

        Raises:
            MessageError: if there are not k values, or one is not finite.
        """
        if len(masters) != self.terms.elements:
            raise MessageError(f"got {len(masters)} master values, {self.terms.elements} were expected")
        if not np.isfinite(masters).all():
            raise MessageError("a master value is not finite")
        self.optimizer.weights.set_masters_(torch.from_numpy(masters.copy()))
        self.round = round

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the next step."""
        self.optimizer.param_groups[0]["lr"] = lr

    @contextmanager
    def rolled_back(self) -> Iterator[SparseZO]:
        """Context with the optimizer for a client's local steps. On exit, the weights are restored bit for bit."""
        masters = self.optimizer.weights.masters()
        try:
            yield self.optimizer
        finally:
            self.optimizer.weights.set_masters_(masters)
            self.optimizer.projected_gradients.clear()


__all__ = ["Replica"]
