"""``SparseZO``: two-point zeroth-order steps on the masked elements of a model, as a ``torch.optim.Optimizer``.

    g = (f(w + eps * (z * m)) - f(w - eps * (z * m))) / (2 * eps)          projected gradient, a scalar
    w <- w - lr * g * (z * m)

References:
    Meerkat, arXiv 2506.03337, section 3; MeZO, arXiv 2305.17333, algorithm 1; Spall 1992 (SPSA).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import NonFiniteLossError
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
        seed: root seed in [0, 2**64); step ``t`` uses ``step_seed(seed, 0, t)`` unless it is given one.
        backend: "auto" (Triton on GPUs; on CPUs numba where it is installed, else torch), "torch", "numba", "triton".
        params: parameter groups over the model's parameters, as any torch optimizer takes them; every parameter with
            masked elements must be in one. None is one group of all of these.

    Raises:
        ValueError: for a learning rate, eps, seed or group out of range.
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
    ) -> None:
        _check_lr(lr)
        _check_eps(eps)
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
        self._at_once = self._values.device.type != "cuda"  # whether a look at a loss is free; on a GPU it would wait
        self._closed = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float], seed: int | None = None) -> Tensor:  # type: ignore[override]
        """One two-point step.

        Args:
            closure: computes the loss of the batch, a scalar; called twice in inference mode, at +eps and at -eps, and
                must see the same batch both times.
            seed: of the perturbation; None is ``step_seed(root seed, 0, number of steps taken)``.

        Returns:
            Mean of the two losses, float32 scalar.

        On a GPU nothing here waits for it, unless the closure does.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite. This and whatever the closure raises leave the weights
                restored and the step not taken. On a GPU, it is raised when ``projected_gradients`` is next read.
            ModelChangedError: if the model was moved, cast or rebuilt since the optimizer was.
        """
        return self.step_many([closure], None if seed is None else [seed])[0]

    @torch.no_grad()
    def step_many(
        self, closures: Iterable[Callable[[], Tensor | float]], seeds: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Several steps, the update of each in one pass with the first perturbation of the next.

        The weights and scalars are those of ``step`` called for each, bit for bit.

        Args:
            closures: one a step, as for ``step``; each is asked for when the step before it is known, so a generator
                may choose its batch and the learning rate then.
            seeds: one a step at least; None is as for ``step``.

        Returns:
            Mean of the two losses of each step, float32 scalars.

        Raises:
            NonFiniteLossError: as ``step``; the steps before it stay taken.
            ModelChangedError: as ``step``.
        """
        if seeds is not None:
            self._values.seeds(seeds)
        given = None if seeds is None else iter(seeds)
        pending: tuple[Tensor, Tensor] | None = None
        losses = []
        self.weights.check_same_parameters()
        try:
            for closure in closures:
                seed = self._values.seed(self._next_seed() if given is None else next(given))
                eps = self._eps()
                if pending is None:
                    self.weights.perturb_(seed, self._fp32(eps))
                else:
                    self.weights.update_perturb_(*pending, seed, self._fp32(eps))
                    pending = None
                pair = torch.empty(2, dtype=torch.float32, device=self._values.device)
                self._evaluate(closure, pair[:1], "+eps")
                self.weights.perturb_(seed, self._fp32(-eps))
                self._evaluate(closure, pair[1:], "-eps")
                record = self.weights.coefficients(pair, self._fp64(eps), self._fp64(*self._rates()))
                if self._at_once:
                    _check_taken(record[None], self.steps)
                self._records.append(record)
                pending = seed, record[2:]
                self.steps += 1
                losses.append(record[0])
        finally:
            if pending is None:
                self.restore()
            else:
                self.weights.update_(*pending)
        return losses

    @property
    def projected_gradients(self) -> list[float]:
        """fp32 scalars of the steps taken by ``step``, oldest first; a list, clear it as you like.

        Raises:
            NonFiniteLossError: once, if a loss on the GPU was NaN or infinite; the step was not taken and its scalar
                is in the list as it was.
        """
        if self._records:
            records, self._records = torch.stack(self._records).cpu(), []
            self._projected_gradients += records[:, 1].tolist()
            _check_taken(records, self.steps - len(records))
        return self._projected_gradients

    def perturb(self, seed: int, scale: float) -> None:
        """Sets the masked weights to ``cast(master + scale * z(seed))``; the masters stay."""
        self.weights.perturb_(self._values.seed(seed), self._fp32(scale))

    def restore(self) -> None:
        """Sets the masked weights back to ``cast(master)``, bit for bit."""
        self.weights.restore_()

    def apply(self, seed: int, g: float) -> None:
        """The update of a step whose scalar is known: ``master <- master - fp32(lr * g) * z(seed)``.

        Raises:
            ValueError: if ``g`` or ``lr * g`` is not finite in fp32.
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

    def _next_seed(self) -> int:
        """Of the next step; a batch of them goes to the device at a time."""
        if self.steps % _SEEDS == 0 and not self._at_once:
            self._values.seeds([step_seed(self.seed, 0, self.steps + i) for i in range(_SEEDS)])
        return step_seed(self.seed, 0, self.steps)

    def _rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.param_groups]

    def _fp32(self, *values: float) -> Tensor:
        return self._values.numbers(values, torch.float32)

    def _fp64(self, *values: float) -> Tensor:
        return self._values.numbers(values, torch.float64)

    def _evaluate(self, closure: Callable[[], Tensor | float], out: Tensor, where: str) -> None:
        """Writes the closure's loss to ``out``, float32 [1]: a copy, since the closure may use its tensor again."""
        with torch.inference_mode():
            value = closure()
        if not isinstance(value, Tensor):
            out.fill_(value)
        elif value.numel() == 1:
            out.copy_(value.detach().reshape(1))
        else:
            raise ValueError(f"the closure must return one loss, got a tensor of shape {list(value.shape)}")
        if self._at_once and not math.isfinite(out.item()):
            raise NonFiniteLossError(
                f"the loss at {where} is {out.item()}; the weights are restored (try a smaller lr or eps)"
            )

    def _eps(self) -> float:
        eps = cast(float, self.param_groups[0]["eps"])
        for number, group in enumerate(self.param_groups):
            if group["eps"] != eps:
                raise ValueError(
                    f"eps is one perturbation's scale: group {number} has {group['eps']}, group 0 has {eps}"
                )
        _check_eps(eps)
        return eps


def _check_taken(records: Tensor, first: int) -> None:
    """Raises ``NonFiniteLossError`` for the first record that is not finite; ``first`` numbers the first of them."""
    bad = (~records.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        loss, g, *c = records[bad[0]].tolist()
        raise NonFiniteLossError(
            f"step {first + bad[0]} was not taken: mean loss {loss}, projected gradient {g}, lr * g {c} "
            f"(try a smaller lr or eps)"
        )


def _check_lr(lr: float | Tensor) -> None:
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be finite and not negative, got {lr}")


def _check_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be finite and positive, got {eps}")


__all__ = ["SparseZO"]
