"""``MaskedWeights``: the masked elements of a live model, their fp32 masters, and three operations on them.

    perturb:  w <- cast(master + scale * z)
    restore:  w <- cast(master)
    update:   master <- master - c * z,  w <- cast(master)

The live weight is always its rounded, possibly perturbed master. Elements outside the mask are never written.
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
class _MaskedParameter:
    """One parameter with masked elements, and its address, dtype and device when the table was built."""

    name: str
    parameter: nn.Parameter
    group: int
    base: int  # element id of its first element
    start: int  # its masked elements are mask.ids[start:stop]
    stop: int
    address: int
    dtype: torch.dtype
    device: torch.device

    @property
    def dense(self) -> bool:
        """Whether all elements are masked and the alignment allows a table without offsets."""
        return self.stop - self.start == self.parameter.numel() and can_be_dense(self.parameter, self.base)

    @property
    def launch_key(self) -> tuple[object, ...]:
        """Parameters with the same key share one table, and so one launch per operation."""
        return self.group, self.dtype, self.device, self.dense


@dataclass(frozen=True)
class _LaunchGroup:
    """Masked parameters of one group, dtype and device, all dense or all sparse: one launch per operation."""

    group: int
    parameters: tuple[_MaskedParameter, ...]
    table: ElementTable
    master: Tensor  # float32 [slots] on the weights' device
    backend: Backend

    def to_device(self, value: Tensor) -> Tensor:
        """Copies seeds, scales or coefficients to this group's device without waiting."""
        return value.to(self.master.device, non_blocking=True)

    def coefficient(self, c: Tensor) -> Tensor:
        """Selects this group's coefficient, float32 [1], from the coefficients of all groups, float32 [groups]."""
        return self.to_device(c[self.group : self.group + 1])

    def slot_ranges(self) -> list[tuple[_MaskedParameter, int, int]]:
        """Each parameter with its slots in ``master``: (parameter, start, stop)."""
        starts, counts = self.table.starts, self.table.counts
        return [(p, start, start + count) for p, start, count in zip(self.parameters, starts, counts, strict=False)]


def round_fp32(value: float) -> float:
    """Rounds to the nearest fp32 number."""
    return torch.tensor(value, dtype=torch.float32).item()


class MaskedWeights:
    """The masked elements of one model in memory.

    Holds 8 bytes per masked element (master and offset) on the device of the weights; 4 where all elements of a
    parameter are masked.

    Args:
        model: the model. Its parameters with masked elements must be contiguous; every operation writes them.
        mask: a mask made for this model.
        backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.
        groups: group number by parameter name, for updates with one coefficient per group. None puts all parameters
            into group 0.

    Attributes:
        mask: the mask.
        values: makes seeds and scales for the operations, on the device of the first masked parameter.

    Raises:
        MaskError: if the mask was made for another model, or two parameters share memory.
        ValueError: if a masked parameter is not contiguous.
        ConfigError: if the backend is not available.
    """

    def __init__(
        self, model: nn.Module, mask: SparseMask, backend: str = "auto", groups: Mapping[str, int] | None = None
    ) -> None:
        mask.check(model)
        self.mask = mask
        self._model = model
        parameters = _masked_parameters(model, mask, groups or {})
        keys = dict.fromkeys(p.launch_key for p in parameters)
        self._launch_groups = [
            _launch_group([p for p in parameters if p.launch_key == key], mask.ids, backend) for key in keys
        ]
        self.values = DeviceValues(self._launch_groups[0].master.device)

    def names(self) -> list[str]:
        """Names of the parameters that have masked elements, in id order."""
        return [p.name for p in sorted(self._parameters(), key=lambda p: p.base)]

    def tables(self) -> list[ElementTable]:
        """Tables of the masked elements. Each operation launches once per table."""
        return [group.table for group in self._launch_groups]

    def perturb_(self, seed: Tensor, scale: Tensor) -> None:
        """Sets ``w <- cast(master + scale * z)``.

        All operations take such tensors, which the device reads when the operation runs. So a captured launch can be
        replayed with other values.

        Args:
            seed: int64 [1], seed of ``z``; see ``values``.
            scale: float32 [1], ``+eps`` or ``-eps``; see ``values``.

        Raises:
            ModelChangedError: if the model was moved or cast, in this and all other operations.
        """
        for group in self._checked_groups():
            group.backend.perturb_(group.table, group.master, group.to_device(seed), group.to_device(scale))

    def restore_(self) -> None:
        """Sets ``w <- cast(master)``, exactly."""
        for group in self._checked_groups():
            group.backend.restore_(group.table, group.master)

    def coefficients(self, losses: Tensor, eps: Tensor, lr: Tensor) -> Tensor:
        """Computes mean loss, projected gradient and each group's ``c`` from two losses; ``reference.coefficients``."""
        return self._launch_groups[0].backend.coefficients(losses, eps, lr)

    def update_(self, seed: Tensor, c: Tensor) -> None:
        """Applies ``master <- master - c * z``, then ``w <- cast(master)``.

        Args:
            seed: int64 [1], seed of ``z``.
            c: float32 [groups], coefficient ``lr * g`` of each group.
        """
        for group in self._checked_groups():
            group.backend.update_(group.table, group.master, group.to_device(seed), group.coefficient(c))

    def update_perturb_(self, seed: Tensor, c: Tensor, next_seed: Tensor, scale: Tensor) -> None:
        """Does ``update_(seed, c)``, then ``perturb_(next_seed, scale)``, in one pass over the weights."""
        for group in self._checked_groups():
            group.backend.update_perturb_(
                group.table,
                group.master,
                group.to_device(seed),
                group.coefficient(c),
                group.to_device(next_seed),
                group.to_device(scale),
            )

    def replay_(self, seeds: Sequence[int], c: Sequence[float]) -> None:
        """Applies many updates in order, in one pass over the weights: the bits of ``update_`` for each.

        Args:
            seeds: seed of each update, in [0, 2**64).
            c: coefficient of each update, the same for all groups.

        Raises:
            ValueError: if a coefficient is not finite in fp32.
        """
        coefficients = torch.tensor(c, dtype=torch.float32)
        if not coefficients.isfinite().all():
            position = int((~coefficients.isfinite()).nonzero()[0])
            raise ValueError(f"the coefficient lr * g of update {position} is {c[position]}, which fp32 cannot hold")
        device_seeds, coefficients = self.values.seeds(seeds), to_device_async(coefficients, self.values.device)
        for group in self._checked_groups():
            group.backend.replay_(
                group.table, group.master, group.to_device(device_seeds), group.to_device(coefficients)
            )

    def unchanged_fraction(self, seed: int, eps: float) -> float:
        """Share of the masked elements whose weight neither ``+eps`` nor ``-eps`` would change, in [0, 1].

        Counts elements with ``cast(master + scale * z) == cast(master)``, bit for bit, for both scales. Nothing is
        written, and the result does not depend on the current weights. Temporaries: about 40 bytes per element, for a
        few million elements at a time.

        Args:
            seed: seed of ``z``, in [0, 2**64).
            eps: perturbation scale.
        """
        check_seed(seed)
        scale, unchanged = self.values.numbers([eps], torch.float32), 0
        for group in self._checked_groups():
            for start, stop in reference.windows(group.table):
                step = group.backend.normal(seed, group.table.ids(start, stop)) * group.to_device(scale)
                master, dtype = group.master[start:stop], group.parameters[0].dtype
                unmoved = _same_bits(master + step, master, dtype) & _same_bits(master - step, master, dtype)
                tensor_slices = group.table.tensor_slices(start, stop)
                unchanged += int(
                    torch.stack([unmoved[low - start : high - start].sum() for _, low, high in tensor_slices]).sum()
                )
        return unchanged / len(self.mask)

    def masters(self) -> Tensor:
        """Returns a copy of the masters: float32 [k] in mask order, on the device of the first masked parameter."""
        out = torch.empty(len(self.mask), dtype=torch.float32, device=self._launch_groups[0].master.device)
        for group in self._launch_groups:
            for p, start, stop in group.slot_ranges():
                out[p.start : p.stop] = group.master[start:stop]
        return out

    def set_masters_(self, values: Tensor) -> None:
        """Sets the masters and restores the weights to them.

        Args:
            values: float32 [k], in mask order.

        Raises:
            ValueError: if ``values`` has another shape or dtype.
        """
        if values.shape != self.mask.ids.shape or values.dtype != torch.float32:
            raise ValueError(f"masters must be float32 [{len(self.mask)}], got {values.dtype} {list(values.shape)}")
        for group in self._launch_groups:
            for p, start, stop in group.slot_ranges():
                group.master[start:stop] = values[p.start : p.stop]
        self.restore_()

    def _parameters(self) -> list[_MaskedParameter]:
        return [p for group in self._launch_groups for p in group.parameters]

    def _checked_groups(self) -> list[_LaunchGroup]:
        """Returns the launch groups after checking that their tables are still valid."""
        self.check_not_moved()
        return self._launch_groups

    def check_not_moved(self) -> None:
        """Raises ``ModelChangedError`` with the first parameter whose address, dtype or device has changed."""
        for p in self._parameters():
            live = p.parameter
            if live.data_ptr() != p.address or live.dtype != p.dtype or live.device != p.device:
                now = f"{live.dtype} on {live.device}"
                if (live.dtype, live.device) == (p.dtype, p.device):
                    now += " at another address"
                raise ModelChangedError(
                    f"parameter {p.name!r} was moved or cast: it was {p.dtype} on {p.device}, now it is {now}; "
                    f"move and cast the model first, then build the optimizer"
                )

    def check_same_parameters(self) -> None:
        """Raises ``ModelChangedError`` if a masked parameter is no longer a parameter of the model."""
        present = {id(parameter) for parameter in self._model.parameters()}
        for p in self._parameters():
            if id(p.parameter) not in present:
                raise ModelChangedError(
                    f"parameter {p.name!r} was replaced in the model; build the optimizer after changing the model"
                )


def _masked_parameters(model: nn.Module, mask: SparseMask, groups: Mapping[str, int]) -> list[_MaskedParameter]:
    masked = []
    by_name = dict(floating_parameters(model))
    for name, base, start, stop in mask.ranges():
        parameter = by_name[name]
        if not parameter.is_contiguous():
            raise ValueError(f"parameter {name!r} has masked elements and is not contiguous; call .contiguous() on it")
        masked.append(
            _MaskedParameter(
                name=name,
                parameter=parameter,
                group=groups.get(name, 0),
                base=base,
                start=start,
                stop=stop,
                address=parameter.data_ptr(),
                dtype=parameter.dtype,
                device=parameter.device,
            )
        )
    if len({p.address for p in masked}) < len(masked):
        raise MaskError("two parameters share their memory without being the same parameter; tie them as one Parameter")
    return masked


def _launch_group(parameters: list[_MaskedParameter], ids: Tensor, backend: str) -> _LaunchGroup:
    """Builds the table of parameters with the same ``launch_key``, and reads their masters from the weights."""
    weights = [p.parameter.detach() for p in parameters]
    offsets = None if parameters[0].dense else [ids[p.start : p.stop] - p.base for p in parameters]
    device = weights[0].device
    table = build_table(weights, [p.base for p in parameters], offsets)
    master = torch.zeros(table.slots, dtype=torch.float32, device=device)
    group = _LaunchGroup(
        group=parameters[0].group,
        parameters=tuple(parameters),
        table=table,
        master=master,
        backend=backends.resolve(backend, device),
    )
    for i, (_, start, stop) in enumerate(group.slot_ranges()):
        weight = table.weights[i]
        master[start:stop] = weight if offsets is None else weight[offsets[i].to(device)]
    return group


def _same_bits(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Compares two float32 tensors [n] bit for bit after a cast to ``dtype``: bool [n]."""
    int_dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return a.to(dtype).view(int_dtype) == b.to(dtype).view(int_dtype)


__all__ = ["MaskedWeights", "round_fp32"]
