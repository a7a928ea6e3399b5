"""``SparseZO``: zeroth-order steps on the masked elements of a model, as a ``torch.optim.Optimizer``.

    g_j = (f(w + eps * (z_j * m)) - f(w - eps * (z_j * m))) / (2 * eps)          projected gradient of query j, a scalar
    w <- w - (lr / q) * g_j * (z_j * m)                                          for each of the q queries, in order

References:
    Meerkat, arXiv 2506.03337, section 3. See the module ``estimator`` for the estimators and their references.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from typing import Any, NoReturn, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from .captured import BoundLoss, Capture, CapturedSteps, check_capture
from .errors import ModelError
from .estimator import (
    ESTIMATES,
    Estimator,
    NonFinite,
    check_all_finite,
    check_enough_queries,
    check_eps,
    check_estimator,
    check_nonfinite,
    check_queries,
    evaluate_closure,
    two_point_together,
)
from .frozen.weight import frozen_weights
from .graphs import CudaGraphs
from .journal import Journal
from .mask import SparseMask
from .param_groups import check_lr, check_masked, common_eps, group_numbers
from .parameters import floating_parameters
from .step_seeds import StepSeeds
from .step_warnings import StepWarnings
from .stream import VERSION, check_seed, step_seed
from .two_points import BothPoints, PointsMode, check_points_mode
from .updates import UpdateLog
from .weights import MaskedWeights, round_fp32

_T = TypeVar("_T")


class _Phase(Enum):
    """What the optimizer is doing."""

    IDLE = auto()
    CHANGING = auto()  # within step, step_many or apply, but not in the middle of a step
    IN_STEP = auto()


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
        estimator: "two-point", "forward-difference" or "normalized-difference"; see ``Estimator``.
        nonfinite: "raise" or "skip": how to handle a query whose losses or coefficient are NaN or infinite; see
            ``step``.
        frozen: whether masked elements of parameters that do not require gradients are trained too.
        capture: "auto" or "off": whether steps with a ``BoundLoss`` are captured as CUDA graphs where that is possible.
        points: "separate", "together" or "auto": whether the losses at +eps and -eps come from one forward pass over
            the batch twice, if the masked weights are beside frozen ones (see ``BothPoints``). The losses are the same
            up to float rounding. Only for the two-point estimator and causal LMs of transformers.
        debug: whether to check before every pass, and not only before every ``step`` or ``step_many``, that nothing
            else has written the masked weights, the closure included. It holds a second copy of the masked weights and
            makes the host wait.

    Between steps the masked weights belong to the optimizer. If something else writes them (``load_state_dict`` of the
    model, averaged weights, another optimizer), the next step raises ``ModelChangedError``, and ``reload`` or
    ``restore`` continues. Steps are for models in evaluation mode: with dropout in training mode, the two losses of a
    query differ by more than the perturbation.

    Raises:
        ValueError: if the learning rate, eps, seed, a group, ``queries``, ``estimator`` or ``nonfinite`` is out of
            range; if a masked parameter is in no group, frozen, or cannot be written (see ``MaskedWeights``).
        MaskError: if the mask was made for another model, or parameters share memory.

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
        frozen: bool = False,
        capture: str = Capture.AUTO,
        points: str = PointsMode.SEPARATE,
        debug: bool = False,
    ) -> None:
        check_lr(lr)
        check_eps(eps)
        self.queries, self.estimator = check_queries(queries), check_estimator(estimator)
        check_enough_queries(self.queries, self.estimator)
        self.nonfinite = check_nonfinite(nonfinite)
        self.capture, self.points = check_capture(capture), check_points_mode(points)
        if self.points is PointsMode.TOGETHER and self.estimator is not Estimator.TWO_POINT:
            raise ValueError("points='together' is for the two-point estimator")
        self.seed = check_seed(seed)
        self._groups_fixed = False
        if params is None:
            params = [{"params": [p for _, p in floating_parameters(model)]}]
        super().__init__(params, {"lr": lr, "eps": eps})
        for group in self.param_groups:
            check_lr(group["lr"])
        common_eps(self.param_groups)
        self._model, self._mask, self._backend, self._debug = model, mask, backend, debug
        self._numbers = group_numbers(model, self.param_groups)
        self._warnings = StepWarnings(model)
        self._phase = _Phase.IDLE
        self._unequal: Tensor | None = (
            None  # counts of ``MaskedWeights.count_overwritten`` that are still on the device
        )
        self._projected_gradients: list[float] = []
        self._read_masters(frozen=frozen)
        _keep_compiler_out()
        self._groups_fixed = True

    def _read_masters(self, *, frozen: bool) -> None:
        """Reads the masters from the live weights, and starts an empty journal."""
        weights = MaskedWeights(self._model, self._mask, self._backend, self._numbers, debug=self._debug)
        check_masked(self._model, weights.names(), self._numbers, frozen=frozen)
        names = [[name for name in weights.names() if self._numbers[name] == i] for i in range(len(self.param_groups))]
        journal = Journal(weights, tuple(map(tuple, names)) if len(names) > 1 else ())
        self.weights, self._journal, self._unequal = weights, journal, None
        self._seeds = StepSeeds(weights.values, self.queries)
        self._captured = self._make_captured(weights)
        self._both = self._make_both_points(weights)
        # On a GPU a check of a value would make the host wait, so it comes when the scalars are read.
        self._waits = weights.values.device.type != "cuda"
        self._check_immediately = self._waits and self.nonfinite is NonFinite.RAISE

    def _make_captured(self, weights: MaskedWeights) -> CapturedSteps:
        """Decides how steps with a ``BoundLoss`` are taken."""
        device = weights.values.device
        graphs, reason = (CudaGraphs(device) if device.type == "cuda" else None), None
        if self._debug:
            reason = "with debug=True, all passes look at the weights first"
        elif any(table.blocks.device != device for table in weights.tables()):
            reason = "the model is on several devices"
        elif frozen_weights(self._model):
            reason = "the weights are frozen, and made dense anew in every forward"
        elif graphs is not None and self._backend not in ("auto", "triton"):
            reason = f"the backend {self._backend!r} reads seeds on the host"
        return CapturedSteps(self._model, weights, self.estimator, self.queries, len(self.param_groups), graphs, reason)

    def _make_both_points(self, weights: MaskedWeights) -> BothPoints | None:
        """Decides whether the points of a step may be computed in one forward pass."""
        if self.points is PointsMode.SEPARATE or self.estimator is not Estimator.TWO_POINT:
            return None
        if self.points is PointsMode.AUTO and not set(weights.names()) <= frozen_weights(self._model).keys():
            return None
        try:
            return BothPoints(self._model, weights, self.points)
        except ModelError:
            if self.points is PointsMode.TOGETHER:
                raise
            return None  # no language model: two forward passes

    @property
    def not_together(self) -> str | None:
        """Why the points of a step are not computed in one forward pass, although it would pay; None if they are."""
        return None if self._both is None else self._both.reason

    @property
    def captured_steps(self) -> int:
        """Number of steps with a ``BoundLoss`` that were replayed from a CUDA graph, since the masters were read."""
        return self._captured.steps

    @property
    def not_captured(self) -> str | None:
        """Why steps with a ``BoundLoss`` are not captured, the latest reason; None if there was none."""
        return self._captured.reason

    @property
    def steps(self) -> int:
        """Number of steps taken, those before a loaded state included."""
        return self._journal.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._journal.steps = steps

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor | float], seed: SupportsIndex | Sequence[SupportsIndex] | None = None
    ) -> Tensor:
        """Takes one step of ``queries`` perturbations.

        Args:
            closure: computes the loss of the batch, a float32 scalar (in bfloat16 or float16 most of the difference of
                two losses is rounded away). It is called in inference mode and must use the same batch in every call.
                Two-point: called at +eps and at -eps of each query. The others: called at ``w``, then at +eps of each
                query. A ``BoundLoss`` lets a GPU record the step once and replay it, in one launch.
            seed: seed of the perturbation in [0, 2**64), or one seed for each query. None uses
                ``step_seed(root seed, 0, number of steps so far, query)``.

        Returns:
            Two-point: mean of all losses. The other estimators: the loss at ``w``. Float32 scalar.

        On a GPU the step never makes the host wait, unless the closure does.

        With ``nonfinite="skip"`` a query is skipped if one of its losses, its projected gradient or ``lr * g`` in any
        group is NaN or infinite. The weights keep their values, the query's scalar in ``projected_gradients`` is NaN,
        and the step still counts. Queries are skipped independently, except that a non-finite loss at ``w`` (forward
        difference), or any (normalized difference), skips all queries of the step. The closure is called as often as in
        any other step, on every device. The returned loss is computed from the losses as they are, and may be NaN or
        infinite.

        Raises:
            TypeError: if there is no closure, or it returns something else than a number.
            ValueError: if the number of seeds is not ``queries``, or a learning rate or eps was set out of range.
            NonFiniteLossError: with ``nonfinite="raise"``, if a loss is NaN or infinite. After this error, or any error
                of the closure, the weights are restored and the step is not applied. On a GPU the error is raised when
                ``projected_gradients`` or ``log`` is next read, and only the query with that loss is not applied.
            ModelChangedError: if something else has written the masked weights since the step before (nothing is
                changed then; on a GPU the old values are put back and the error is raised when ``projected_gradients``
                or ``log`` is next read); if the model was moved, cast or rebuilt after the optimizer was created; or
                if the update has taken float16 weights beyond their range.
        """
        return self._step(closure, seed)

    def _step(
        self, closure: Callable[[], Tensor | float], seed: SupportsIndex | Sequence[SupportsIndex] | None
    ) -> Tensor:
        if not callable(closure):
            raise TypeError(
                f"a step needs a closure that returns the loss, got {type(closure).__name__}; tools that call step() "
                f"without one, such as torch.distributed.checkpoint's get_state_dict, cannot be used: save state_dict()"
            )
        if self._phase is _Phase.CHANGING:
            return self._take_step(closure, seed)
        return self._changing("step", lambda: self._take_step(closure, seed))

    @torch.no_grad()
    def step_many(
        self, closures: Iterable[Callable[[], Tensor | float]], seeds: Sequence[SupportsIndex] | None = None
    ) -> list[Tensor]:
        """Takes several steps and saves passes over the weights.

        With the two-point estimator, the last update of a step shares one pass with the first perturbation of the next.
        Weights and scalars are bit-identical to calling ``step`` once per closure. Hooks that are registered for
        ``step`` run for each of them, with restored weights; then nothing is saved.

        Args:
            closures: one closure per step, see ``step``. The next closure is requested after the step before it, so a
                generator may choose the batch and the learning rate at that moment; the weights are still perturbed
                then.
            seeds: seeds in [0, 2**64), at least ``queries`` per step, in the order (step, query). None uses the default
                seeds, see ``step``.

        Returns:
            One loss per step, see ``step``.

        Raises:
            ValueError: if there are fewer seeds than the steps need.
            NonFiniteLossError: see ``step``; the steps before it stay applied.
            ModelChangedError: see ``step``.
        """
        return self._step_many(closures, seeds)

    def _step_many(
        self, closures: Iterable[Callable[[], Tensor | float]], seeds: Sequence[SupportsIndex] | None
    ) -> list[Tensor]:
        def take_steps() -> list[Tensor]:
            losses = []
            for number, closure in enumerate(closures):
                given = None if seeds is None else self._seeds.given(seeds, number)
                # torch's wrapper around `step` takes longer than the passes over a small mask.
                direct = callable(closure) and not self._is_step_watched()
                losses.append((self._take_step if direct else self.step)(closure, given))
            return losses

        return self._changing("step_many", take_steps)

    def _is_step_watched(self) -> bool:
        """Whether somebody would notice that ``step`` is not called: a hook, a subclass, or a scheduler's wrapper."""
        return self._has_step_hooks() or "step" in vars(self) or type(self).step is not SparseZO.step

    @property
    def projected_gradients(self) -> list[float]:
        """fp32 scalars of all queries, in the order (step, query). The caller may clear the list at any time.

        With ``nonfinite="skip"`` the scalar of a skipped query is NaN and all others are finite.

        Raises:
            NonFiniteLossError: with ``nonfinite="raise"``, once, if a loss on the GPU was NaN or infinite. That query
                was not applied; the list contains its scalar unchanged.
            ModelChangedError: on a GPU, see ``step``.
        """
        self._read()
        return self._projected_gradients

    @property
    def log(self) -> UpdateLog:
        """All updates since the optimizer was created, or since ``load_state_dict`` or ``reload``; see ``replay``.

        Raises:
            NonFiniteLossError: see ``projected_gradients``.
            ModelChangedError: if something else has written the masked weights, or set their masters.

        Each access checks all updates and hashes the masters.
        """
        self._check_idle("log")
        self._journal.flush_()
        self._read()
        self.weights.check_not_overwritten()
        return self._journal.log()

    def unchanged_fraction(self, seed: SupportsIndex | None = None) -> float:
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
            step_seed(self.seed, 0, self.steps) if seed is None else seed, common_eps(self.param_groups)
        )

    def perturb(self, seed: SupportsIndex, scale: float) -> None:
        """Sets the masked weights to ``cast(master + scale * z(seed))``; the masters do not change.

        Raises:
            ModelChangedError: see ``step``.
        """
        self._check_idle("perturb")
        self._check_not_overwritten()
        self.weights.perturb_(self.weights.values.seed(check_seed(seed)), self._fp32(scale))

    def restore(self) -> None:
        """Sets the masked weights back to ``cast(master)``, bit for bit, whatever has written them.

        A model that was moved or cast is written where it is now.

        Raises:
            ModelChangedError: if a masked parameter was replaced in the model.
        """
        self._check_idle("restore")
        self._unequal = None
        if self._journal.pending():
            self._journal.flush_()
        self.weights.restore_anywhere_()

    def reload(self) -> None:
        """Reads the masters from the model as it is now: other values, dtype, device or parameter objects.

        The number of steps stays; ``log`` starts again from here, and ``projected_gradients`` is not changed.

        Raises:
            MaskError: if the mask no longer fits the model.
            ValueError: see the class.
        """
        self._check_idle("reload")
        self._show_gradients()
        steps, parameters = self.steps, dict(floating_parameters(self._model))
        self._mask.check(self._model)
        groups: list[list[nn.Parameter]] = [[] for _ in self.param_groups]
        for name, number in self._numbers.items():
            groups[number].append(parameters[name])
        self._read_masters(frozen=True)  # checked when the optimizer was created
        for group, members in zip(self.param_groups, groups, strict=True):
            group["params"] = members
        self.steps = steps

    def apply(self, seed: SupportsIndex, g: float) -> None:
        """Applies the update of one query: ``master <- master - fp32((lr / queries) * g) * z(seed)``.

        It is in ``log``, but is no step.

        Args:
            seed: seed of the query's perturbation, in [0, 2**64).
            g: projected gradient of the query.

        Raises:
            ValueError: if ``g`` or its product with the learning rate is not finite in fp32.
            ModelChangedError: see ``step``.
        """
        self._check_idle("apply")
        seed, rates = check_seed(seed), self._query_learning_rates()
        c = [lr * g for lr in rates]
        if not all(math.isfinite(round_fp32(value)) for value in (g, *c)):
            raise ValueError(f"projected gradient and lr * g must be finite in fp32, got {g} and {c}")
        self._changing(
            "apply",
            lambda: self._journal.append_update(seed, self.weights.values.seed(seed), rates, float(g), self._fp32(*c)),
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ``ValueError`` after construction: mask and groups are static."""
        if getattr(self, "_groups_fixed", False):
            raise ValueError("SparseZO's parameter groups are fixed; pass them all to the constructor as `params`")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns masters (float32 [k], in mask order), step count, seed and groups: all that resuming needs.

        Raises:
            ModelChangedError: if something else has written the masked weights, or masked parameters were replaced:
                the masters would not be those of the model. A model that was moved or cast is no error.
        """
        self._check_idle("state_dict")
        if self._journal.pending():
            self._journal.flush_()
        self.weights.check_masters_are_current()
        own: dict[Any, Any] = {
            "masters": self.weights.masters(),
            "steps": self.steps,
            "seed": self.seed,
            "stream_version": VERSION,
            "mask_digest": self.weights.mask.digest,
            **self._fixed_settings(),
        }
        try:
            self.state.update(own)  # torch packs it, and hooks see it
            return super().state_dict()
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a ``state_dict`` and sets the model's masked weights to its masters; ``log`` starts again from there.

        Learning rates are those of the state, as in any torch optimizer, and so is an eps that was changed since
        construction.

        Args:
            state_dict: a result of ``state_dict`` of an optimizer with the same mask, groups and settings.

        Raises:
            ValueError: if it belongs to another mask or stream version, its masters are not finite, its groups differ,
                or it is from an optimizer created with other ``queries``, ``estimator`` or ``eps``. Nothing is changed.
        """
        self._check_idle("load_state_dict")
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over a state that torch has unpacked, after checking all of it."""
        own = state["state"]
        wanted = {"mask_digest": self.weights.mask.digest, "stream_version": VERSION} | self._fixed_settings()
        for key, expected in wanted.items():
            if own.get(key) != expected:
                raise ValueError(f"the state's {key} is {own.get(key)!r}, this optimizer's is {expected!r}")
        for group in state["param_groups"]:
            check_lr(group["lr"])
        common_eps(state["param_groups"])
        masters, steps, seed = own["masters"], int(own["steps"]), check_seed(own["seed"])
        self.weights.check_masters(masters)
        self._show_gradients()
        super().__setstate__({"param_groups": state["param_groups"]})
        self.weights.set_masters_(masters)
        self._journal.restart()
        self._journal.steps, self.seed, self._unequal = steps, seed, None

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raises ``TypeError``: a copy would not belong to any model."""
        raise TypeError(
            "SparseZO writes into its own model, so it cannot be copied or pickled; save state_dict(), build a new "
            "optimizer for the other model, and load it there"
        )

    def _check_idle(self, what: str) -> None:
        """Raises ``RuntimeError`` within a step: the masked weights are perturbed, and an update may be pending."""
        if self._phase is not _Phase.IDLE:
            raise RuntimeError(f"{what} was called within a step; call it before or after step or step_many")

    def _changing(self, what: str, change: Callable[[], _T]) -> _T:
        """Runs a change of the weights, and leaves them restored with all updates, whatever is raised.

        Args:
            what: name of the method, for errors.
            change: enters steps or updates in the journal.
        """
        self._check_idle(what)
        try:
            self._phase = _Phase.CHANGING
            self._begin()
            result = change()
        finally:
            self._phase = _Phase.IDLE
            try:  # here and not in a function, because an interrupt can also come when a function is entered
                self._journal.flush_()
            except BaseException:
                self._journal.flush_()
                raise
        self._check_range()
        return result

    def _begin(self) -> None:
        """Prepares for steps or updates: finishes what was interrupted, and checks the model."""
        self._journal.flush_()
        self._check_not_overwritten()
        if self._journal.masters_were_replaced():
            self._read()  # before the journal restarts
        self._journal.begin()
        self._warnings.mode()
        self._warnings.compiler()

    def _check_not_overwritten(self) -> None:
        """Checks that nothing else has written the masked weights; on a GPU only counts, without waiting."""
        counts = self.weights.count_overwritten()
        if self._waits:
            self.weights.check_counts(counts)
        else:
            self._unequal = counts if self._unequal is None else self._unequal + counts

    def _check_range(self) -> None:
        """Raises ``ModelChangedError`` if float16 cannot hold an update; on a GPU the next step finds it."""
        if self._waits and any(table.weights[0].dtype == torch.float16 for table in self.weights.tables()):
            self.weights.check_not_overwritten()

    def _take_step(
        self, closure: Callable[[], Tensor | float], seeds: SupportsIndex | Sequence[SupportsIndex] | None
    ) -> Tensor:
        """Takes one step, whose last updates remain pending in the journal."""
        eps, rates = common_eps(self.param_groups), self._query_learning_rates()
        numbers = self._seeds.default(self.seed, self.steps) if seeds is None else self._seeds.one_each(seeds)
        tensors = [self.weights.values.seed(seed) for seed in numbers]
        evaluate = functools.partial(
            evaluate_closure,
            check_immediately=self._check_immediately,
            on_low_precision=self._warnings.low_precision,
        )
        self._phase = _Phase.IN_STEP
        taken = None
        if self.capture is Capture.AUTO and isinstance(closure, BoundLoss):
            taken = self._captured.take(self._journal, closure, tensors, eps, rates, evaluate, self._record)
        if taken is None:
            on_device = self._fp64(*rates)
            estimate = ESTIMATES[self.estimator]
            if self._both is not None:
                estimate = functools.partial(two_point_together, both=self._both)
            taken = estimate(
                self._journal, tensors, eps, functools.partial(evaluate, closure),
                lambda pair, half: self._record(
                    pair, half if isinstance(half, Tensor) else self._fp64(half), on_device
                ),
            )  # fmt: skip
        loss, records = taken
        self._phase = _Phase.CHANGING
        self._journal.append(numbers, tensors, rates, records)
        if self._check_immediately:
            self._warnings.gradients(record[1].item() for record in records)
        if self._has_step_hooks():
            self._journal.flush_()
        return loss

    def _has_step_hooks(self) -> bool:
        """Whether hooks run between the steps of ``step_many``: they must see restored weights."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )

    def _query_learning_rates(self) -> list[float]:
        """Learning rate of one query (``lr / queries``) in each parameter group."""
        return [check_lr(group["lr"]) / self.queries for group in self.param_groups]

    def _fixed_settings(self) -> dict[str, Any]:
        """Settings that a state must share with the optimizer that loads it."""
        return {"queries": self.queries, "estimator": str(self.estimator), "eps": self.defaults["eps"]}

    def _fp32(self, *values: float) -> Tensor:
        return self.weights.values.numbers(values, torch.float32)

    def _fp64(self, *values: float) -> Tensor:
        return self.weights.values.numbers(values, torch.float64)

    def _record(self, pair: Tensor, eps: Tensor, rates: Tensor) -> Tensor:
        """Makes a query's record, float32 [2 + groups]: mean loss, projected gradient, coefficient of each group.

        Args:
            pair: float32 [2], the two losses of the query.
            eps: float64 [1], half the distance between the two points, in units of ``z``; see ``estimator.Record``.
            rates: float64 [groups], learning rate of one query in each group.
        """
        record = self.weights.coefficients(pair, eps, rates)
        if self._check_immediately:
            check_all_finite(record[None], self.steps)
        return record

    def _read(self) -> None:
        """Brings the scalars of all steps from the device, with the checks that were postponed."""
        new = self._show_gradients()
        if not self._check_immediately:
            self._warnings.gradients(new)
        if self.nonfinite is NonFinite.RAISE:
            self._journal.check_finite(self.queries)
        if self._unequal is not None:
            counts, self._unequal = self._unequal, None
            self.weights.check_counts(counts)

    def _show_gradients(self) -> list[float]:
        """Brings the scalars of all steps from the device into ``projected_gradients``; returns the new ones."""
        journal = self._journal
        journal.read()
        entries = [entry for entry in journal.entries[journal.shown :] if entry.step]
        new = [g for e in entries for g in (e.applied if self.nonfinite is NonFinite.SKIP else e.gradients)]
        gradients, shown = self._projected_gradients + new, len(journal.entries)
        # No call in between: an exception finds both or neither.
        self._projected_gradients, journal.shown = gradients, shown
        return new


@functools.cache
def _keep_compiler_out() -> None:
    """Makes ``torch.compile`` run steps as they are, once an optimizer exists (before, this would import the compiler).

    Steps read values and run code that numba has compiled, which cannot be traced. Closures are not traced either:
    compile the model instead.
    """
    SparseZO._step = torch.compiler.disable(SparseZO._step)  # type: ignore[method-assign]
    SparseZO._step_many = torch.compiler.disable(SparseZO._step_many)  # type: ignore[method-assign]


__all__ = ["Estimator", "NonFinite", "SparseZO"]
