"""``LaunchGroup``: masked parameters of one group, dtype and device, with their element table and fp32 masters."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..triton_kernels import ElementTable, Layout, build_table, can_be_dense
from . import backend as backends
from .backend import Backend
from .errors import MaskError, ModelChangedError
from .frozen.weight import FrozenWeight
from .mask import SparseMask
from .parameters import check_values, floating_parameters

# The masters are fp32: wider parameters would lose bits, narrower ones are packed formats.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MaskedParameter:
    """One parameter with masked elements, and its address, dtype and device when the table was built.

    The address is that of the tensor that holds its live masked weights, see ``live``.
    """

    name: str
    parameter: nn.Parameter
    owner: nn.Module  # the module that holds it
    group: int
    base: int  # element id of its first element
    start: int  # its masked elements are mask.ids[start:stop]
    stop: int
    address: int
    dtype: torch.dtype
    device: torch.device

    @property
    def live(self) -> Tensor:
        """The tensor that holds the live masked weights: the parameter, or the vector beside a frozen one."""
        return live_tensor(self.parameter)

    @cached_property
    def layout(self) -> Layout:
        """Where the live masked weights are; dense if all elements are masked and the alignment allows it."""
        if isinstance(self.parameter, FrozenWeight):
            return Layout.COMPACT
        all_masked = self.stop - self.start == self.parameter.numel()
        return Layout.DENSE if all_masked and can_be_dense(self.parameter, self.base) else Layout.SCATTERED

    @property
    def launch_key(self) -> tuple[object, ...]:
        """Parameters with the same key share one table, and so one launch per operation."""
        return self.group, self.dtype, self.device, self.layout

    @cached_property
    def path(self) -> tuple[str, ...]:
        """Names of the modules on the way to the parameter, then its own name in the last one."""
        return tuple(self.name.split("."))

    @property
    def own_name(self) -> str:
        """Its name in the module that holds it."""
        return self.path[-1]

    def check_memory(self) -> None:
        """Raises ``ModelChangedError`` if the parameter was moved or cast, or its module has another one now."""
        self._check_held_by(self.owner)
        if not self.is_in_place():
            live = self.live
            if isinstance(self.parameter, FrozenWeight):
                raise ModelChangedError(
                    f"the masked weights beside parameter {self.name!r} now belong to another optimizer; call this "
                    f"optimizer's `reload()` to take them back"
                )
            now = f"{live.dtype} on {live.device}"
            if (live.dtype, live.device) == (self.dtype, self.device):
                now += " at another address"
            raise ModelChangedError(
                f"parameter {self.name!r} was moved or cast: it was {self.dtype} on {self.device}, now it is {now}; "
                f"{_REMEDY}"
            )

    def is_in_place(self) -> bool:
        """Whether the parameter has the address, dtype and device that it had."""
        live = self.live
        return live.data_ptr() == self.address and live.dtype == self.dtype and live.device == self.device

    def check_present(self, model: nn.Module) -> None:
        """Raises ``ModelChangedError`` if the parameter is no longer a parameter of the model."""
        module: nn.Module | None = model
        for part in self.path[:-1]:
            module = None if module is None else module._modules.get(part)
        self._check_held_by(module)

    def _check_held_by(self, module: nn.Module | None) -> None:
        if module is None or module._parameters.get(self.own_name) is not self.parameter:
            raise ModelChangedError(f"parameter {self.name!r} was replaced in the model; {_REMEDY}")


def live_tensor(parameter: nn.Parameter) -> Tensor:
    """The tensor that holds a parameter's live weights: itself, or the vector of masked ones beside a frozen one."""
    if not isinstance(parameter, FrozenWeight):
        return parameter
    assert parameter.values is not None
    return parameter.values


_REMEDY = "change the model first, then build the optimizer, or call the optimizer's `reload()`"


@dataclass(frozen=True)
class LaunchGroup:
    """Masked parameters of one group, dtype and device, all dense or all sparse: one launch per operation.

    Args:
        group: number of the parameter group.
        parameters: the parameters.
        table: locations of their masked elements.
        master: masters, float32 [slots] on the weights' device.
        applied: number of updates that each part of the table has, int32 [parts]; see ``Backend.parts``.
        backend: implementation of the operations.
    """

    group: int
    parameters: tuple[MaskedParameter, ...]
    table: ElementTable
    master: Tensor
    applied: Tensor
    backend: Backend

    def to_device(self, value: Tensor) -> Tensor:
        """Copies seeds, scales or coefficients to this group's device without waiting."""
        device = self.master.device
        return value if value.device == device else value.to(device, non_blocking=True)

    def coefficient(self, c: Tensor) -> Tensor:
        """Selects this group's coefficient, float32 [1], from the coefficients of all groups, float32 [groups]."""
        return self.to_device(c if c.numel() == 1 else c[self.group : self.group + 1])

    def has_updates(self, updates: int) -> bool:
        """Whether all parts have this number of updates; waits for the device."""
        return int(self.applied.min()) >= updates

    def slot_ranges(self) -> list[tuple[MaskedParameter, int, int]]:
        """Each parameter with its slots in ``master``: (parameter, start, stop)."""
        starts, counts = self.table.starts, self.table.counts
        return [(p, start, start + count) for p, start, count in zip(self.parameters, starts, counts, strict=False)]

    def live_and_wanted(self) -> Iterator[tuple[MaskedParameter, Tensor, Tensor]]:
        """Yields each parameter with copies of its live masked weights and of ``cast(master)``."""
        for i, (p, start, stop) in enumerate(self.slot_ranges()):
            weight = self.table.weights[i]
            offsets = self.table.offsets
            if offsets is not None and self.table.layout is Layout.SCATTERED:
                live = weight[offsets[start:stop].long()]
            else:
                live = weight.clone()
            yield p, live, self.master[start:stop].to(live.dtype)

    def differing(self) -> list[MaskedParameter]:
        """Parameters of which a live weight is not ``cast(master)``; waits for the device."""
        return [
            p
            for p, live, wanted in self.live_and_wanted()
            if ((live != wanted) & ~(live.isnan() & wanted.isnan())).any()
        ]


@torch.inference_mode(False)
def launch_groups(model: nn.Module, mask: SparseMask, groups: Mapping[str, int], backend: str) -> list[LaunchGroup]:
    """Builds the launch groups of a model, and reads the masters from its weights.

    Works within ``torch.inference_mode`` too: the masters can be written outside of it.

    Args:
        model: the model.
        mask: a mask made for it.
        groups: group number by parameter name; 0 for parameters that it lacks.
        backend: name of the backend.

    Raises:
        MaskError: if a masked parameter shares memory with another parameter.
        ValueError: if a masked parameter is not contiguous, or of a dtype or kind that the operations cannot write.
        ConfigError: if the backend is not available.
    """
    _check_overlap(model, {name for name, *_ in mask.ranges()})
    parameters = _masked_parameters(model, mask, groups)
    keys = dict.fromkeys(p.launch_key for p in parameters)
    return [_launch_group([p for p in parameters if p.launch_key == key], mask.ids, backend) for key in keys]


def _masked_parameters(model: nn.Module, mask: SparseMask, groups: Mapping[str, int]) -> list[MaskedParameter]:
    masked, beside = [], []
    by_name = dict(floating_parameters(model))
    for name, base, start, stop in mask.ranges():
        parameter = by_name[name]
        _check_writable(name, parameter)
        if isinstance(parameter, FrozenWeight):
            beside.append((parameter, parameter.beside(mask.ids[start:stop] - base)))
    for parameter, vectors in beside:  # after all checks: a mask that is refused takes nothing from an optimizer
        parameter.set_beside(*vectors)
    for name, base, start, stop in mask.ranges():
        parameter = by_name[name]
        masked.append(
            MaskedParameter(
                name=name,
                parameter=parameter,
                owner=model.get_submodule(name.rpartition(".")[0]),
                group=groups.get(name, 0),
                base=base,
                start=start,
                stop=stop,
                address=live_tensor(parameter).data_ptr(),
                dtype=live_tensor(parameter).dtype,
                device=parameter.device,
            )
        )
    return masked


def _check_writable(name: str, parameter: nn.Parameter) -> None:
    """Raises ``ValueError`` unless the operations can write the parameter and fp32 masters hold its values.

    This includes ``ModelError``; see ``parameters.check_values``.
    """
    if parameter.dtype not in _DTYPES:
        raise ValueError(
            f"parameter {name!r} has masked elements and is {parameter.dtype}, but masters are float32: cast the model "
            f"to float32, bfloat16 or float16 first"
        )
    check_values(name, parameter)
    if not isinstance(parameter, FrozenWeight) and not parameter.is_contiguous():
        raise ValueError(f"parameter {name!r} has masked elements and is not contiguous; call .contiguous() on it")


def _check_overlap(model: nn.Module, names: Container[str]) -> None:
    """Raises ``MaskError`` if memory of a masked parameter, by name, belongs to another parameter too."""
    spans: dict[torch.device, list[tuple[int, int, str]]] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, FrozenWeight):  # has no memory that is written
            continue
        if parameter.numel() and parameter.device.type != "meta" and type(parameter.data) is Tensor:
            last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
            start = parameter.data_ptr()
            spans.setdefault(parameter.device, []).append((start, start + (last + 1) * parameter.element_size(), name))
    for spans_of_device in spans.values():
        # The span that ends last among those seen, of all parameters and of the masked ones.
        ends = {False: (0, ""), True: (0, "")}
        for start, stop, name in sorted(spans_of_device):
            end, other = ends[name not in names]  # a masked parameter overlaps with any other, others with masked ones
            if start < end:
                raise MaskError(
                    f"parameters {other!r} and {name!r} share memory without being the same parameter; tie them as one "
                    f"Parameter"
                )
            ends[False] = max(ends[False], (stop, name))
            if name in names:
                ends[True] = max(ends[True], (stop, name))


def _launch_group(parameters: list[MaskedParameter], ids: Tensor, backend: str) -> LaunchGroup:
    """Builds the table of parameters with the same ``launch_key``, and reads their masters from the weights."""
    device, layout = parameters[0].device, parameters[0].layout
    offsets = None if layout is Layout.DENSE else [ids[p.start : p.stop] - p.base for p in parameters]
    weights = [p.live.detach() for p in parameters]
    resolved = backends.resolve(backend, device)
    table = build_table(weights, [p.base for p in parameters], offsets, compact=layout is Layout.COMPACT)
    master = torch.zeros(table.slots, dtype=torch.float32, device=device)
    group = LaunchGroup(
        group=parameters[0].group,
        parameters=tuple(parameters),
        table=table,
        master=master,
        applied=torch.zeros(resolved.parts(table), dtype=torch.int32, device=device),
        backend=resolved,
    )
    for i, (_, start, stop) in enumerate(group.slot_ranges()):
        weight = table.weights[i]
        scattered = offsets if layout is Layout.SCATTERED else None
        master[start:stop] = weight if scattered is None else weight[scattered[i].to(device)]
    return group


__all__ = ["LaunchGroup", "MaskedParameter", "launch_groups"]
