"""``MaskedWeights``: the masked elements of a live model and their fp32 masters, and the three operations on them.

    perturb:  w <- cast(master + scale * z)
    restore:  w <- cast(master)
    update:   master <- master - c * z,  w <- cast(master)

The live weight is always a rounding of its master; elements outside the mask are never written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..triton_kernels import ElementTable, build_table, can_be_dense, reference
from . import backend as backends
from .backend import Backend
from .device_values import DeviceValues, to_device_async
from .errors import MaskError, ModelChangedError
from .mask import SparseMask
from .parameters import floating_parameters
from .stream import check_seed


@dataclass(frozen=True)
class _LocatedParameter:
    """One parameter with masked elements, and where it was when it was located."""

    name: str
    parameter: nn.Parameter
    group: int
    base: int
    start: int  # its elements are [start, stop) of the mask
    stop: int
    address: int
    dtype: torch.dtype
    device: torch.device

    @property
    def dense(self) -> bool:
        """Whether the mask holds all its elements, and they need no offsets."""
        return self.stop - self.start == self.parameter.numel() and can_be_dense(self.parameter, self.base)

    @property
    def key(self) -> tuple[object, ...]:
        """What the parameters of one table have in common."""
        return self.group, self.dtype, self.device, self.dense


@dataclass(frozen=True)
class _Part:
    """The parameters of one group, dtype and device, all dense or all sparse: one table, one launch an operation."""

    group: int
    members: tuple[_LocatedParameter, ...]
    table: ElementTable
    master: Tensor  # float32 [slots] on the weights' device
    backend: Backend

    def here(self, value: Tensor) -> Tensor:
        """A seed or scale on the device of this part."""
        return value.to(self.master.device, non_blocking=True)

    def own(self, c: Tensor) -> Tensor:
        """Of one coefficient a group, the one of this part's."""
        return self.here(c[self.group : self.group + 1])


def round_fp32(value: float) -> float:
    """The nearest fp32 number, as a float."""
    return torch.tensor(value, dtype=torch.float32).item()


class MaskedWeights:
    """The masked elements of one model in memory.

    Holds 8 bytes per masked element (master and offset) on the device of the weights; 4 where the mask holds a whole
    parameter.

    Args:
        model: its parameters with masked elements must be contiguous; they are written by every operation.
        mask: of this model.
        backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.
        groups: group number of each parameter name, for updates with a coefficient per group; None: all in group 0.

    Attributes:
        values: seeds and scales as the operations take them, on the device of the first masked parameter.

    Raises:
        MaskError: if the mask is another model's.
        ValueError: if a masked parameter is not contiguous.
        ConfigError: if the backend is not to be had.
    """

    def __init__(
        self, model: nn.Module, mask: SparseMask, backend: str = "auto", groups: Mapping[str, int] | None = None
    ) -> None:
        mask.check(model)
        self.mask = mask
        self._model = model
        located = _locate(model, mask, groups or {})
        keys = dict.fromkeys(at.key for at in located)
        self._parts = [_part([at for at in located if at.key == key], mask.ids, backend) for key in keys]
        self.values = DeviceValues(self._parts[0].master.device)

    def names(self) -> list[str]:
        """The parameters that have masked elements, in id order."""
        return [at.name for at in sorted((at for part in self._parts for at in part.members), key=lambda at: at.base)]

    def tables(self) -> list[ElementTable]:
        """Where the masked elements are; each operation goes over all of them."""
        return [part.table for part in self._parts]

    def perturb_(self, seed: Tensor, scale: Tensor) -> None:
        """``w <- cast(master + scale * z)``: seed int64 [1], scale float32 [1] (see ``values``).

        This and the other operations read such values when the device gets to them, so that a captured launch may be
        replayed with others.
        """
        for part in self._checked():
            part.backend.perturb_(part.table, part.master, part.here(seed), part.here(scale))

    def restore_(self) -> None:
        """``w <- cast(master)``: exact."""
        for part in self._checked():
            part.backend.restore_(part.table, part.master)

    def coefficients(self, losses: Tensor, eps: Tensor, lr: Tensor) -> Tensor:
        """Mean loss, projected gradient and ``c`` of each group from two losses; ``reference.coefficients``."""
        return self._parts[0].backend.coefficients(losses, eps, lr)

    def update_(self, seed: Tensor, c: Tensor) -> None:
        """``master <- master - c * z``, ``w <- cast(master)``: seed int64 [1], c float32 [groups]."""
        for part in self._checked():
            part.backend.update_(part.table, part.master, part.here(seed), part.own(c))

    def update_perturb_(self, seed: Tensor, c: Tensor, next_seed: Tensor, scale: Tensor) -> None:
        """``update_(seed, c)``, then ``perturb_(next_seed, scale)``, in one pass over the weights."""
        for part in self._checked():
            part.backend.update_perturb_(
                part.table, part.master, part.here(seed), part.own(c), part.here(next_seed), part.here(scale)
            )

    def replay_(self, seeds: Sequence[int], c: Sequence[float]) -> None:
        """``update_`` for each seed in [0, 2**64) and its coefficient in order, in one pass over the weights.

        Raises:
            ValueError: if a coefficient is not finite, or does not stay so in fp32.
        """
        coefficients = torch.tensor(c, dtype=torch.float32)
        if not coefficients.isfinite().all():
            at = int((~coefficients.isfinite()).nonzero()[0])
            raise ValueError(f"the coefficient lr * g of update {at} is {c[at]}, which fp32 cannot hold")
        of_updates, coefficients = self.values.seeds(seeds), to_device_async(coefficients, self.values.device)
        for part in self._checked():
            part.backend.replay_(part.table, part.master, part.here(of_updates), part.here(coefficients))

    def unchanged_fraction(self, seed: int, eps: float) -> float:
        """Share of the masked elements whose weight neither ``+eps`` nor ``-eps`` would change, in [0, 1].

        These are the ones with ``cast(master + scale * z) == cast(master)``, bit for bit, for both scales. Nothing is
        written, wherever the weights are. Temporaries: some 40 bytes an element, of a few million elements at a time.

        Args:
            seed: of ``z``, in [0, 2**64).
            eps: perturbation scale.
        """
        check_seed(seed)
        scale, unchanged = self.values.numbers([eps], torch.float32), 0
        for part in self._checked():
            for start, stop in reference.windows(part.table):
                step = part.backend.normal(seed, part.table.ids(start, stop)) * part.here(scale)
                master, dtype = part.master[start:stop], part.members[0].dtype
                unmoved = _same_bits(master + step, master, dtype) & _same_bits(master - step, master, dtype)
                pieces = part.table.pieces(start, stop)
                unchanged += int(
                    torch.stack([unmoved[low - start : high - start].sum() for _, low, high in pieces]).sum()
                )
        return unchanged / len(self.mask)

    def masters(self) -> Tensor:
        """A copy of the masters: float32 [k] in mask order, on the device of the first masked parameter."""
        out = torch.empty(len(self.mask), dtype=torch.float32, device=self._parts[0].master.device)
        for part in self._parts:
            for at, begin, end in _ranges(part):
                out[at.start : at.stop] = part.master[begin:end]
        return out

    def set_masters_(self, values: Tensor) -> None:
        """Sets the masters from float32 [k] in mask order and restores the weights to them."""
        if values.shape != self.mask.ids.shape or values.dtype != torch.float32:
            raise ValueError(f"masters must be float32 [{len(self.mask)}], got {values.dtype} {list(values.shape)}")
        for part in self._parts:
            for at, begin, end in _ranges(part):
                part.master[begin:end] = values[at.start : at.stop]
        self.restore_()

    def _checked(self) -> list[_Part]:
        self.check_not_moved()
        return self._parts

    def check_not_moved(self) -> None:
        """Raises ``ModelChangedError`` naming the first parameter that is no longer where it was located."""
        for part in self._parts:
            for at in part.members:
                p = at.parameter
                if p.data_ptr() != at.address or p.dtype != at.dtype or p.device != at.device:
                    now = f"{p.dtype} on {p.device}"
                    if (p.dtype, p.device) == (at.dtype, at.device):
                        now += " at another address"
                    raise ModelChangedError(
                        f"parameter {at.name!r} was moved or cast: located as {at.dtype} on {at.device}, now {now}; "
                        f"move and cast the model first, then build the optimizer"
                    )

    def check_same_parameters(self) -> None:
        """Raises ``ModelChangedError`` if the model no longer uses a parameter that was located."""
        present = {id(p) for p in self._model.parameters()}
        for part in self._parts:
            for at in part.members:
                if id(at.parameter) not in present:
                    raise ModelChangedError(
                        f"parameter {at.name!r} was replaced in the model; build the optimizer after changing the model"
                    )


def _locate(model: nn.Module, mask: SparseMask, groups: Mapping[str, int]) -> list[_LocatedParameter]:
    located = []
    parameters = dict(floating_parameters(model))
    for name, base, start, stop in mask.ranges():
        p = parameters[name]
        if not p.is_contiguous():
            raise ValueError(f"parameter {name!r} has masked elements and is not contiguous; call .contiguous() on it")
        located.append(
            _LocatedParameter(name, p, groups.get(name, 0), base, start, stop, p.data_ptr(), p.dtype, p.device)
        )
    if len({at.address for at in located}) < len(located):
        raise MaskError("two parameters share their memory without being the same parameter; tie them as one Parameter")
    return located


def _part(members: list[_LocatedParameter], ids: Tensor, backend: str) -> _Part:
    weights = [at.parameter.detach() for at in members]
    offsets = None if members[0].dense else [ids[at.start : at.stop] - at.base for at in members]
    device = weights[0].device
    table = build_table(weights, [at.base for at in members], offsets)
    master = torch.zeros(table.slots, dtype=torch.float32, device=device)
    part = _Part(members[0].group, tuple(members), table, master, backends.resolve(backend, device))
    for i, (_, begin, end) in enumerate(_ranges(part)):
        weight = table.weights[i]
        master[begin:end] = weight if offsets is None else weight[offsets[i].to(device)]
    return part


def _same_bits(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether two float32 tensors [n] are the same numbers after a cast, bit for bit: bool [n]."""
    as_ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return a.to(dtype).view(as_ints) == b.to(dtype).view(as_ints)


def _ranges(part: _Part) -> list[tuple[_LocatedParameter, int, int]]:
    """Each member and the slots of its elements."""
    starts, counts = part.table.starts, part.table.counts
    return [(at, start, start + count) for at, start, count in zip(part.members, starts, counts, strict=False)]


__all__ = ["MaskedWeights", "round_fp32"]
