"""``SparseZO``: zeroth-order steps on the masked elements of a model, as a ``torch.optim.Optimizer``.

    g_j = (f(w + eps * (z_j * m)) - f(w - eps * (z_j * m))) / (2 * eps)          projected gradient of query j, a scalar
    w <- w - (lr / q) * g_j * (z_j * m)                                          for each of the q queries, in order

References:
    Meerkat, arXiv 2506.03337, section 3. See the module ``estimator`` for the estimators and their references.
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

# Number of seeds sent to a GPU in one transfer.
_SEEDS_PER_TRANSFER = 64


class SparseZO(torch.optim.Optimizer):
    """Zeroth-order SGD on the masked elements, with fp32 masters and exact restore.

    Args:
        model: any module. Every step writes the weights of its masked elements.
        mask: a mask made for this model.
        lr: learning rate (eta), finite and not negative. Each parameter group has its own; schedulers may change it.
        eps: perturbation scale, positive; the same in every group.
        seed: root seed in [0, 2**64). Query ``j`` of step ``t`` uses ``step_seed(seed, 0, t, j)`` unless the caller
            passes a seed.
        backend: "auto" (Triton on GPUs; on CPUs numba where it is installed, else torch), "torch", "numba", "triton".
        params: parameter groups over the model's parameters, in the format of any torch optimizer. Every parameter
            with masked elements must be in a group. None puts all parameters into one group.
        queries: number of perturbations per step (q), at least 1. Each query has its own seed and scalar, and is
            applied with the learning rate ``lr / q``.
        estimator: "two-point" or "forward-difference"; see ``Estimator``.
        nonfinite: "raise" or "skip": how to handle a query whose losses or coefficient are NaN or infinite; see
            ``step``.

    Raises:
        ValueError: if the learning rate, eps, seed, a group, ``queries``, ``estimator`` or ``nonfinite`` is out of
            range.
        MaskError: if the mask was made for another model.

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
        self._records: list[Tensor] = []  # records of the latest queries, still on the device
        self._groups_fixed = False
        names = {id(p): name for name, p in floating_parameters(model)}
        if params is None:
            params = [{"params": [p for _, p in floating_parameters(model)]}]
        super().__init__(params, {"lr": lr, "eps": eps})
        groups = {}
        for number, group in enumerate(self.param_groups):
            _check_lr(group["lr"])
            for p in group["params"]:
                if id(p) not in names:
                    raise ValueError(
                        f"parameter group {number} has a tensor {list(p.shape)} that the model does not have"
                    )
                groups[names[id(p)]] = number
        self.weights = MaskedWeights(model, mask, backend, groups)
        missing = [name for name in self.weights.names() if name not in groups]
        if missing:
            raise ValueError(f"parameter {missing[0]!r} has masked elements and is in no parameter group")
        self._values = self.weights.values
        # Check each loss right after its forward pass if a non-finite one is an error, except on a GPU: reading the
        # loss there would make the host wait.
        self._check_immediately = self.nonfinite is NonFinite.RAISE and self._values.device.type != "cuda"
        self._groups_fixed = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float], seed: int | None = None) -> Tensor:  # type: ignore[override]
        """Takes one step of ``queries`` perturbations.

        Args:
            closure: computes the loss of the batch, a scalar. It is called in inference mode and must use the same
                batch in every call. Two-point: called at +eps and at -eps of each query. Forward difference: called at
                ``w``, then at +eps of each query.
            seed: seed of the perturbation in [0, 2**64), allowed only with one query per step (see ``step_many`` for
                more). None uses ``step_seed(root seed, 0, number of steps so far, query)``.

        Returns:
            Two-point: mean of all losses. Forward difference: the loss at ``w``. Float32 scalar.

        On a GPU the step never makes the host wait, unless the closure does.

        With ``nonfinite="skip"`` a query is skipped if one of its losses, its projected gradient or ``lr * g`` in any
        group is NaN or infinite. The weights keep their values, the query's scalar in ``projected_gradients`` is NaN,
        and the step still counts. Queries are skipped independently, except that a non-finite loss at ``w`` (forward
        difference) skips all queries of the step. The closure is called as often as in any other step, on every
        device. The returned loss is computed from the losses as they are, and may be NaN or infinite.

        Raises:
            ValueError: if a seed is given and a step has several queries.
            NonFiniteLossError: with ``nonfinite="raise"``, if a loss is NaN or infinite. After this error, or any error
                of the closure, the weights are restored and the step is not applied. On a GPU the error is raised when
                ``projected_gradients`` is next read, and only the query with that loss is not applied.
            ModelChangedError: if the model was moved, cast or rebuilt after the optimizer was created.
        """
        if seed is not None and self.queries > 1:
            raise ValueError(f"a step has {self.queries} queries, each with its own seed: step_many([closure], seeds)")
        return self.step_many([closure], None if seed is None else [seed])[0]

    @torch.no_grad()
    def step_many(
        self, closures: Iterable[Callable[[], Tensor | float]], seeds: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Takes several steps and saves passes over the weights.

        With the two-point estimator, the last update of a step shares one pass with the first perturbation of the next.
        Weights and scalars are bit-identical to calling ``step`` once per closure.

        Args:
            closures: one closure per step, see ``step``. The next closure is requested after the step before it, so a
                generator may choose the batch and the learning rate at that moment.
            seeds: seeds in [0, 2**64), at least ``queries`` per step, in the order (step, query). None uses the default
                seeds, see ``step``.

        Returns:
            One loss per step, see ``step``.

        Raises:
            ValueError: if there are fewer seeds than the steps need.
            NonFiniteLossError: see ``step``; the steps before it stay applied.
            ModelChangedError: see ``step``.
        """
        given_seeds = None if seeds is None else self._seeds_on_device(seeds)
        first_step, updates = self.steps, PendingUpdates(self.weights)
        losses = []
        self.weights.check_same_parameters()
        try:
            for closure in closures:
                if given_seeds is None:
                    step_seeds: Sequence[Tensor] = self._default_seeds()
                else:
                    step_seeds = self._given_seeds(given_seeds, self.steps - first_step)
                evaluate = functools.partial(evaluate_closure, closure, check_immediately=self._check_immediately)
                loss, records = ESTIMATES[self.estimator](updates, step_seeds, self._eps(), evaluate, self._record)
                self._records += records
                updates.pending += [
                    (seed, nan_unless_all_finite(record[2:])) for seed, record in zip(step_seeds, records, strict=True)
                ]
                self.steps += 1
                losses.append(loss)
        finally:
            updates.flush_()
        return losses

    @property
    def projected_gradients(self) -> list[float]:
        """fp32 scalars of all queries, in the order (step, query). The caller may clear the list at any time.

        With ``nonfinite="skip"`` the scalar of a skipped query is NaN and all others are finite.

        Raises:
            NonFiniteLossError: with ``nonfinite="raise"``, once, if a loss on the GPU was NaN or infinite. That query
                was not applied; the list contains its scalar unchanged.
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
        """Share of the masked elements that a perturbation does not change, in [0, 1]. Check it before a run.

        Low-precision weights lie on a coarse grid: in [0.5, 1) the spacing is 2**-8 in bfloat16 and 2**-11 in float16,
        and it scales with the size of the weight. A perturbation ``eps * z`` of less than half the spacing is rounded
        away in both directions. Such an element does not influence the losses, but the update still moves its master.
        If the share is large, use a larger eps, or float32, where the share is practically 0 with the usual eps.

        Args:
            seed: seed of the perturbation in [0, 2**64). None uses the seed of the first query of the next step.

        Raises:
            ValueError: if eps or the seed is out of range.
            ModelChangedError: if the model was moved or cast after the optimizer was created.
        """
        return self.weights.unchanged_fraction(
            step_seed(self.seed, 0, self.steps) if seed is None else seed, self._eps()
        )

    def perturb(self, seed: int, scale: float) -> None:
        """Sets the masked weights to ``cast(master + scale * z(seed))``; the masters do not change."""
        self.weights.perturb_(self._values.seed(seed), self._fp32(scale))

    def restore(self) -> None:
        """Sets the masked weights back to ``cast(master)``, bit for bit."""
        self.weights.restore_()

    def apply(self, seed: int, g: float) -> None:
        """Applies the update of one query: ``master <- master - fp32((lr / queries) * g) * z(seed)``.

        Args:
            seed: seed of the query's perturbation, in [0, 2**64).
            g: projected gradient of the query.

        Raises:
            ValueError: if ``g`` or its product with the learning rate is not finite in fp32.
        """
        c = [lr * g for lr in self._query_learning_rates()]
        if not all(math.isfinite(round_fp32(value)) for value in (g, *c)):
            raise ValueError(f"projected gradient and lr * g must be finite in fp32, got {g} and {c}")
        self.weights.update_(self._values.seed(seed), self._fp32(*c))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ``ValueError`` after construction: mask and groups are static."""
        if getattr(self, "_groups_fixed", False):
            raise ValueError("SparseZO's parameter groups are fixed; pass them all to the constructor as `params`")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns masters (float32 [k], in mask order), step count, seed and groups: all that resuming needs."""
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
        """Loads a ``state_dict`` and sets the model's masked weights to its masters.

        Args:
            state_dict: a result of ``state_dict`` of an optimizer with the same mask and groups.

        Raises:
            ValueError: if it belongs to another mask or stream version, or its groups differ.
        """
        state = state_dict["state"]
        for key, expected in (("mask_digest", self.weights.mask.digest), ("stream_version", VERSION)):
            if state.get(key) != expected:
                raise ValueError(f"the state's {key} is {state.get(key)!r}, this optimizer's is {expected!r}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.weights.set_masters_(state["masters"])
        self.steps = int(state["steps"])
        self.seed = check_seed(state["seed"])

    def _default_seeds(self) -> list[Tensor]:
        """Seeds of the next step's queries, int64 [1] each; sent to the device for several steps at a time."""
        steps_ahead = max(1, _SEEDS_PER_TRANSFER // self.queries)
        if self.steps % steps_ahead == 0 and not self._check_immediately:
            steps = range(self.steps, self.steps + steps_ahead)
            self._values.seeds([step_seed(self.seed, 0, t, j) for t in steps for j in range(self.queries)])
        return [self._values.seed(step_seed(self.seed, 0, self.steps, j)) for j in range(self.queries)]

    def _seeds_on_device(self, seeds: Sequence[int]) -> list[Tensor]:
        """Sends all seeds to the device in one transfer: int64 [1] each."""
        on_device = self._values.seeds(seeds)
        return [on_device[i : i + 1] for i in range(len(seeds))]

    def _given_seeds(self, seeds: Sequence[Tensor], step: int) -> Sequence[Tensor]:
        """Seeds of a step's queries.

        Args:
            seeds: all seeds of the call, int64 [1] each.
            step: number of the step, 0 for the first step of the call.
        """
        first, stop = step * self.queries, (step + 1) * self.queries
        if stop > len(seeds):
            raise ValueError(f"{len(seeds)} seeds were given; {step + 1} steps of {self.queries} queries need {stop}")
        return seeds[first:stop]

    def _query_learning_rates(self) -> list[float]:
        """Learning rate of one query (``lr / queries``) in each parameter group."""
        return [float(group["lr"]) / self.queries for group in self.param_groups]

    def _fp32(self, *values: float) -> Tensor:
        return self._values.numbers(values, torch.float32)

    def _fp64(self, *values: float) -> Tensor:
        return self._values.numbers(values, torch.float64)

    def _record(self, pair: Tensor, eps: float) -> Tensor:
        """Makes a query's record, float32 [2 + groups]: mean loss, projected gradient, coefficient of each group.

        Args:
            pair: float32 [2], the two losses of the query.
            eps: half the distance between the two points, in units of ``z``.
        """
        record = self.weights.coefficients(pair, self._fp64(eps), self._fp64(*self._query_learning_rates()))
        if self._check_immediately:
            check_all_finite(record[None], self.steps)
        return record

    def _eps(self) -> float:
        eps = cast(float, self.param_groups[0]["eps"])
        for number, group in enumerate(self.param_groups):
            if group["eps"] != eps:
                raise ValueError(
                    f"all parameter groups must have the same eps: group {number} has {group['eps']}, group 0 has {eps}"
                )
        check_eps(eps)
        return eps


def _check_lr(lr: float | Tensor) -> None:
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be finite and not negative, got {lr}")


__all__ = ["Estimator", "NonFinite", "SparseZO"]
