"""``Replica``: one copy of the model at a known round, brought forward by scalars alone."""

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
    """A model that stands at the beginning of a round.

    In a network every client has one; in a simulation all clients and the server share one, because a client's state
    between rounds is nothing but the masked values, which are the same for all.

    Args:
        model: the base model; its masked weights are written.
        mask: of this model, the one the terms name.
        terms: of the federation.
        backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.

    Raises:
        MaskError: if the mask is not the one the terms name, or another model's.
    """

    def __init__(self, model: nn.Module, mask: SparseMask, terms: Terms, backend: str = "auto") -> None:
        if mask.digest != terms.mask_digest:
            raise MaskError(f"the federation uses the mask {terms.mask_digest[:12]}, this is {mask.digest[:12]}")
        self.model = model
        self.terms = terms
        one_sided = terms.gradient is Gradient.FORWARD_DIFFERENCE
        self.optimizer = SparseZO(
            model,
            mask,
            lr=terms.lr,
            eps=terms.eps,
            seed=terms.seed,
            backend=backend,
            queries=terms.queries,
            estimator=Estimator.FORWARD_DIFFERENCE if one_sided else Estimator.TWO_POINT,
            nonfinite=NonFinite.SKIP,  # a bad batch of one client is no reason to stop the others
        )
        self.round = 1

    def apply_rounds(self, scalars: Sequence[Sequence[float]]) -> None:
        """Moves on over some rounds by their aggregated scalars, [rounds][T * queries], in one pass."""
        seeds, c = [], []
        for row in scalars:
            for seed, lr, g in self.terms.updates(self.round, row):
                seeds.append(seed)
                c.append(lr * g)
            self.round += 1
        self.optimizer.weights.replay_(seeds, c)

    def catch_up(self, first_round: int, scalars: np.ndarray) -> None:
        """Applies the rounds from ``first_round`` on that this replica has not applied yet.

        Raises:
            MessageError: if rounds are missing before them, or the scalars are no whole number of rounds.
        """
        values = self.terms.values
        if len(scalars) % values:
            raise MessageError(f"{len(scalars)} scalars are no whole number of rounds of {values} scalars")
        if first_round > self.round:
            raise MessageError(f"the scalars begin at round {first_round}, this client stands at round {self.round}")
        if not np.isfinite(scalars).all():
            raise MessageError("an aggregated scalar is not finite")
        self.apply_rounds(scalars.reshape(-1, values)[self.round - first_round :].tolist())

    def load_masters(self, round: int, masters: np.ndarray) -> None:
        """Takes over the masters at the beginning of a round, float32 [k]."""
        if len(masters) != self.terms.elements:
            raise MessageError(f"{len(masters)} master values for a mask of {self.terms.elements} elements")
        if not np.isfinite(masters).all():
            raise MessageError("a master value is not finite")
        self.optimizer.weights.set_masters_(torch.from_numpy(masters.copy()))
        self.round = round

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        self.optimizer.param_groups[0]["lr"] = lr

    @contextmanager
    def rolled_back(self) -> Iterator[SparseZO]:
        """Lends the optimizer for a client's local steps and takes them back afterwards, bit for bit."""
        masters = self.optimizer.weights.masters()
        try:
            yield self.optimizer
        finally:
            self.optimizer.weights.set_masters_(masters)
            self.optimizer.projected_gradients.clear()


__all__ = ["Replica"]
