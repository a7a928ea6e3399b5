"""``SparseZO``: zeroth-order steps on the masked elements of a model, as a ``torch.optim.Optimizer``.

    g_j = (f(w + eps * (z_j * m)) - f(w - eps * (z_j * m))) / (2 * eps)          projected gradient of query j, a scalar
    w <- w - (lr / q) * g_j * (z_j * m)                                          for each of the q queries, in order

References:
    Meerkat, arXiv 2506.03337, section 3. ``estimator`` has the estimators and where they come from.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .estimator import (
    ESTIMATES,
    Estimator,
    NonFinite,
    PendingUpdates,
    check_all_finite,
    check_eps,
    check_estimator,
    check_nonfinite,
    check_queries,
    evaluate_closure,
    gradients_or_nan,
    nan_unless_all_finite,
)
from .mask import SparseMask
from .parameters import floating_parameters
from .stream import VERSION, check_seed, step_seed
from .weights import MaskedWeights, round_fp32

# Seeds put on a GPU at a time.
_SEEDS = 64


class SparseZO(torch.optim.Optimizer):
    """Zeroth-order SGD on the masked elements, with fp32 masters and exact restore.

    Args:
        model: any module; the weights of its masked elements are written by every step.
        mask: of this model.
        lr: learning rate (eta), not negative. One per parameter group; schedulers may change it.
        eps: perturbation scale, positive; the same in every group.
        seed: root seed in [0, 2**64); query ``j`` of step ``t`` uses ``step_seed(seed, 0, t, j)`` unless it is given
            one.
        backend: "auto" (Triton on GPUs; on CPUs numba where it is installed, else torch), "torch", "numba", "triton".
        params: parameter groups over the model's parameters, as any torch optimizer takes them; every parameter with
            masked elements must be in one. None is one group of all of these.
        queries: perturbations a step (q), at least 1; each has a seed, a scalar, and a share ``lr / q`` of the step.
        estimator: "two-point" or "forward-difference"; see ``Estimator``.
        nonfinite: "raise" or "skip", what becomes of a query whose losses or coefficient are NaN or infinite; see
            ``step``.

    Raises:
        ValueError: for a learning rate, eps, seed, group, number of queries, estimator or ``nonfinite`` out of range.
        MaskError: if the mask is another model's.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> mask = SparseMask.magnitude(model, density=0.6)
        >>> opt = SparseZO(model, mask, lr=0.05)
        >>> x, y = torch.ones(1, 4), torch.zeros(1, 1)
        >>> loss = opt.step(lambda: nn.functional.mse_loss(model(x), y))
        >>> len(opt.projected_gradients)
        1
    """

    def __init__(
        self,
        model: nn.Module,
        mask: SparseMask,
        *,
        lr: float,
        eps: float = 1e-3,
        seed: int = 0,
        backend: str = "auto",
        params: Iterable[dict[str, Any]] | None = None,
        queries: int = 1,
        estimator: str = Estimator.TWO_POINT,
        nonfinite: str = NonFinite.RAISE,
    ) -> None:
        _check_lr(lr)
        check_eps(eps)
        self.queries, self.estimator = check_queries(queries), check_estimator(estimator)
        self.nonfinite = check_nonfinite(nonfinite)
        self.seed = check_seed(seed)
        self.steps = 0
        self._projected_gradients: list[float] = []
        self._records: list[Tensor] = []  # of the latest steps; still on the device
        self._closed = False
        names = {id(p): name for name, p in floating_parameters(model)}
        if params is None:
            params = [{"params": [p for _, p in floating_parameters(model)]}]
        super().__init__(params, {"lr": lr, "eps": eps})
        groups = {}
        for number, group in enumerate(self.param_groups):
            _check_lr(group["lr"])
            for p in group["params"]:
                if id(p) not in names:
                    raise ValueError(f"parameter group {number} holds a tensor {list(p.shape)} that the model does not")
                groups[names[id(p)]] = number
        self.weights = MaskedWeights(model, mask, backend, groups)
        missing = [name for name in self.weights.names() if name not in groups]
        if missing:
            raise ValueError(f"parameter {missing[0]!r} has masked elements and is in no parameter group")
        self._values = self.weights.values
        # Whether each loss is looked at as it comes: where a bad one is an error, and a look is free (a GPU would wait)
        self._check_immediately = self.nonfinite is NonFinite.RAISE and self._values.device.type != "cuda"
        self._closed = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float], seed: int | None = None) -> Tensor:  # type: ignore[override]
        """One step of ``queries`` perturbations.

        Args:
            closure: computes the loss of the batch, a scalar; called in inference mode, and must see the same batch
                every time. Two-point: at +eps and at -eps of each query. Forward difference: at ``w``, then at +eps of
                each query.
            seed: of the perturbation, where there is one a step (see ``step_many`` for more); None is
                ``step_seed(root seed, 0, number of steps taken, query)``.

        Returns:
            Two-point: mean of all the losses. Forward difference: the loss at ``w``. Float32 scalar.

        On a GPU nothing here waits for it, unless the closure does.

        With ``nonfinite="skip"`` a query is not taken if a loss of it, its projected gradient or ``lr * g`` in any
        group is NaN or infinite: the weights stay as they were, its scalar in ``projected_gradients`` is NaN, and the
        step counts. Each query is skipped on its own, but a bad loss at ``w`` (forward difference) skips all of the
        step. The closure is called as often as in any step, on every device, and the loss returned is whatever the
        forwards gave, NaN and infinity included.

        Raises:
            ValueError: if a seed is given and there are several queries.
            NonFiniteLossError: with ``nonfinite="raise"``, if a loss is NaN or infinite. This and whatever the closure
                raises leave the weights restored and the step not taken. On a GPU, it is raised when
                ``projected_gradients`` is next read, and what is not taken is the query.
            ModelChangedError: if the model was moved, cast or rebuilt since the optimizer was.
        """
        if seed is not None and self.queries > 1:
            raise ValueError(f"a step has {self.queries} queries, each with its own seed: step_many([closure], seeds)")
        return self.step_many([closure], None if seed is None else [seed])[0]

    @torch.no_grad()
    def step_many(
        self, closures: Iterable[Callable[[], Tensor | float]], seeds: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Several steps, the last update of each in one pass with the first perturbation of the next (two-point).

        The weights and scalars are those of ``step`` called for each, bit for bit.

        Args:
            closures: one a step, as for ``step``; each is asked for when the step before it is known, so a generator
                may choose its batch and the learning rate then.
            seeds: at least ``queries`` a step, in the order (step, query); None is as for ``step``.

        Returns:
            A loss a step, as ``step`` returns it.

        Raises:
            ValueError: if there are fewer seeds than the steps need.
            NonFiniteLossError: as ``step``; the steps before it stay taken.
            ModelChangedError: as ``step``.
        """
        given = None if seeds is None else self._sent(seeds)
        first, walk = self.steps, PendingUpdates(self.weights)
        losses = []
        self.weights.check_same_parameters()
        try:
            for closure in closures:
                of_step = self._default_seeds() if given is None else self._given_seeds(given, self.steps - first)
                evaluate = functools.partial(evaluate_closure, closure, check_immediately=self._check_immediately)
                loss, records = ESTIMATES[self.estimator](walk, of_step, self._eps(), evaluate, self._record)
                self._records += records
                walk.pending += [
                    (seed, nan_unless_all_finite(record[2:])) for seed, record in zip(of_step, records, strict=True)
                ]
                self.steps += 1
                losses.append(loss)
        finally:
            walk.flush_()
        return losses

    @property
    def projected_gradients(self) -> list[float]:
        """fp32 scalars of the steps, in the order (step, query); a list, clear it as you like.

        With ``nonfinite="skip"``, NaN for a query that was not taken, and finite for all others.

        Raises:
            NonFiniteLossError: with ``nonfinite="raise"``, once, if a loss on the GPU was NaN or infinite; the query
                was not taken and its scalar is in the list as it was.
        """
        if self._records:
            records, self._records = torch.stack(self._records).cpu(), []
            if self.nonfinite is NonFinite.SKIP:
                self._projected_gradients += gradients_or_nan(records)
                return self._projected_gradients
            self._projected_gradients += records[:, 1].tolist()
            check_all_finite(records, self.steps * self.queries - len(records), self.queries)
        return self._projected_gradients

    def unchanged_fraction(self, seed: int | None = None) -> float:
        """Share of the masked elements that a perturbation leaves where they are, in [0, 1]; a look before a run.

        Weights of low precision move in steps: those in [0.5, 1) are 2**-8 apart in bfloat16 and 2**-11 in float16, the
        others in proportion to their size. A perturbation ``eps * z`` of less than half a step is rounded away in both
        directions; the element then has no say in the losses, and its master is moved by them all the same. A large
        share asks for a larger eps, or for float32, where it is as good as 0 with the usual eps.

        Args:
            seed: of the perturbation; None is that of the first query of the next step.

        Raises:
            ValueError: if eps or the seed is out of range.
            ModelChangedError: if the model was moved or cast since the optimizer was built.
        """
        return self.weights.unchanged_fraction(
            step_seed(self.seed, 0, self.steps) if seed is None else seed, self._eps()
        )

    def perturb(self, seed: int, scale: float) -> None:
        """Sets the masked weights to ``cast(master + scale * z(seed))``; the masters stay."""
        self.weights.perturb_(self._values.seed(seed), self._fp32(scale))

    def restore(self) -> None:
        """Sets the masked weights back to ``cast(master)``, bit for bit."""
        self.weights.restore_()

    def apply(self, seed: int, g: float) -> None:
        """The update of a query whose scalar is known: ``master <- master - fp32((lr / queries) * g) * z(seed)``.

        Raises:
            ValueError: if ``g`` or its product with the learning rate is not finite in fp32.
        """
        c = [lr * g for lr in self._rates()]
        if not all(math.isfinite(round_fp32(value)) for value in (g, *c)):
            raise ValueError(f"projected gradient and lr * g must be finite in fp32, got {g} and {c}")
        self.weights.update_(self._values.seed(seed), self._fp32(*c))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: mask and groups are static."""
        if getattr(self, "_closed", False):
            raise ValueError("SparseZO's parameter groups are fixed; give them all as `params`")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Masters (float32 [k], in mask order), step count, seeds and groups: all a resumed run needs."""
        packed = super().state_dict()
        packed["state"] = {
            "masters": self.weights.masters(),
            "steps": self.steps,
            "seed": self.seed,
            "stream_version": VERSION,
            "mask_digest": self.weights.mask.digest,
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a ``state_dict``, and sets the model's masked weights to the masters in it.

        Raises:
            ValueError: if it belongs to another mask or stream version, or its groups differ.
        """
        state = state_dict["state"]
        for key, mine in (("mask_digest", self.weights.mask.digest), ("stream_version", VERSION)):
            if state.get(key) != mine:
                raise ValueError(f"the state's {key} is {state.get(key)!r}, this optimizer's is {mine!r}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.weights.set_masters_(state["masters"])
        self.steps = int(state["steps"])
        self.seed = check_seed(state["seed"])

    def _default_seeds(self) -> list[Tensor]:
        """Of the next step's queries; those of some steps go to the device at a time."""
        ahead = max(1, _SEEDS // self.queries)
        if self.steps % ahead == 0 and not self._check_immediately:
            steps = range(self.steps, self.steps + ahead)
            self._values.seeds([step_seed(self.seed, 0, t, j) for t in steps for j in range(self.queries)])
        return [self._values.seed(step_seed(self.seed, 0, self.steps, j)) for j in range(self.queries)]

    def _sent(self, seeds: Sequence[int]) -> list[Tensor]:
        on_device = self._values.seeds(seeds)
        return [on_device[i : i + 1] for i in range(len(seeds))]

    def _given_seeds(self, seeds: Sequence[Tensor], step: int) -> Sequence[Tensor]:
        """Of the queries of a step, counted from the first of this call."""
        first, stop = step * self.queries, (step + 1) * self.queries
        if stop > len(seeds):
            raise ValueError(f"{len(seeds)} seeds were given; {step + 1} steps of {self.queries} queries need {stop}")
        return seeds[first:stop]

    def _rates(self) -> list[float]:
        """Learning rate of a query, by group."""
        return [float(group["lr"]) / self.queries for group in self.param_groups]

    def _fp32(self, *values: float) -> Tensor:
        return self._values.numbers(values, torch.float32)

    def _fp64(self, *values: float) -> Tensor:
        return self._values.numbers(values, torch.float64)

    def _record(self, pair: Tensor, eps: float) -> Tensor:
        """Mean loss, projected gradient and coefficients from the losses at a distance of ``2 * eps``."""
        record = self.weights.coefficients(pair, self._fp64(eps), self._fp64(*self._rates()))
        if self._check_immediately:
            check_all_finite(record[None], self.steps)
        return record

    def _eps(self) -> float:
        eps = cast(float, self.param_groups[0]["eps"])
        for number, group in enumerate(self.param_groups):
            if group["eps"] != eps:
                raise ValueError(
                    f"eps is one perturbation's scale: group {number} has {group['eps']}, group 0 has {eps}"
                )
        check_eps(eps)
        return eps


def _check_lr(lr: float | Tensor) -> None:
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be finite and not negative, got {lr}")


__all__ = ["Estimator", "NonFinite", "SparseZO"]
