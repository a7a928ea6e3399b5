"""``Replica``: a copy of the model at a known round, updated by aggregated scalars."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.errors import MaskError, MessageError
from ..engine.estimator import Estimator, NonFinite
from ..engine.mask import SparseMask
from ..engine.optimizer import SparseZO
from ..engine.two_points import PointsMode
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
        capture: "auto" or "off": whether the local steps are captured as CUDA graphs; see ``SparseZO``.
        points: whether the losses of a step come from one forward pass; see ``SparseZO``.

    Attributes:
        model: the model.
        terms: the federation's terms.
        optimizer: the optimizer of the local steps, on the model's masked weights.
        forwards: begin and end of each forward pass that the client which takes steps has timed; see ``Clock``.

    Each method changes weights and round completely or, if it raises, not at all. Only an interrupt (Ctrl-C) can come
    between; the change is then undone, at the latest when the replica is next used. For this, the masters before the
    change are kept while it lasts: 4 bytes per masked element.

    Raises:
        MaskError: if the mask has another digest than the terms', or does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: SparseMask,
        terms: Terms,
        backend: str = "auto",
        capture: str = "auto",
        points: str = PointsMode.SEPARATE,
    ) -> None:
        if mask.digest != terms.mask_digest:
            raise MaskError(f"the mask has digest {mask.digest[:12]}, the federation uses {terms.mask_digest[:12]}")
        self.model = model
        self.terms = terms
        self.optimizer = SparseZO(
            model,
            mask,
            lr=terms.lr,
            eps=terms.eps,
            seed=terms.seed,
            backend=backend,
            queries=terms.queries,
            estimator=Estimator.TWO_POINT if terms.sends_weights else Estimator(terms.gradient),
            frozen=True,  # the terms' mask says what is trained
            nonfinite=NonFinite.SKIP,  # a bad batch of one client must not stop the others
            capture=capture,
            points=points,
        )
        self.forwards: list[tuple[Any, Any]] = []
        self._round = 1
        # Saved masters and round before the change that is being made.
        self._before: tuple[list[Tensor], int] | None = None

    @property
    def round(self) -> int:
        """The round at whose beginning the model is, from 1."""
        return self._round if self._before is None else self._before[1]

    @round.setter
    def round(self, value: int) -> None:
        self._round = value

    def apply_rounds(self, scalars: Sequence[Sequence[float]]) -> None:
        """Applies the updates of some rounds in one pass over the weights.

        Args:
            scalars: aggregated scalars of consecutive rounds, from the replica's round on: [rounds][T q].

        Raises:
            ValueError: if a round has another number of scalars, or a product with its learning rate is not finite in
                fp32.
        """
        updates = [update for i, row in enumerate(scalars) for update in self.terms.updates(self.round + i, row)]
        if not updates:
            return
        with self._change():
            self.optimizer.weights.replay_([seed for seed, _, _ in updates], [lr * g for _, lr, g in updates])
            self._round += len(scalars)

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
        with self._change():
            self.optimizer.weights.set_masters_(torch.from_numpy(masters.copy()))
            self._round = round

    def masters(self) -> Tensor:
        """Returns a copy of the masked weights in fp32: float32 [k], on the device of the first masked parameter."""
        self._undo_change()
        return self.optimizer.weights.masters()

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the next step."""
        self.optimizer.param_groups[0]["lr"] = lr

    @contextmanager
    def rolled_back(self) -> Iterator[SparseZO]:
        """Context with the optimizer for a client's local steps. On exit, the weights are restored bit for bit."""
        self._begin_change()
        try:
            yield self.optimizer
        finally:
            self._undo_change()

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Context of a change of weights and round, which is undone if anything is raised in it."""
        self._begin_change()
        try:
            yield
            self._before = None  # one assignment: with it, the change has been made
        finally:
            self._undo_change()

    def _begin_change(self) -> None:
        self._undo_change()
        self._before = self.optimizer.weights.saved(), self._round

    def _undo_change(self) -> None:
        """Undoes a change that was not finished. If this is interrupted too, the next call does it from the start."""
        if self._before is not None:
            saved, round = self._before
            self.optimizer.weights.put_back_(saved)
            self.optimizer.projected_gradients.clear()
            self._round = round
            self._before = None


__all__ = ["Replica"]
