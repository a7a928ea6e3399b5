"""The rows of the benchmark: this engine's passes over the weights and the implementations it is compared with.

A row modifies a model's parameters in place. Its three operations are the weight passes of a step:

    perturb   w           -> w + eps z
    flip      w + eps z   -> w - eps z
    update    w - eps z   -> w - c z

References:
    MeZO, arXiv 2305.17333, algorithm 1; DeComFL, arXiv 2405.15861. Their rows are implemented from these descriptions.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..engine import stream
from ..engine.backend import KEPT_NORMALS, resolve
from ..engine.device_values import DeviceValues
from ..engine.mask import SparseMask
from ..engine.weights import MaskedWeights
from ..triton_kernels import ElementTable, build_table
from ..triton_kernels.reference import table_normals

OPERATIONS = ("perturb", "flip", "update")
_SECTOR = 32  # bytes; the smallest unit that memory transfers


class Row(ABC):
    """An implementation of the three operations, bound to one model.

    Attributes:
        exact: True if the results of the operations are specified to the bit. Otherwise they are checked within
            rounding errors.
        normals_drawn: number of normals that each operation draws, by name of the operation.
        bytes_moved: bytes that each operation must transfer, by name of the operation. A 32-byte sector counts once as
            input if it is read or partly written, and once as output if it is written. Temporaries do not count.
        bytes_held: bytes of state kept between steps, without the weights.
    """

    exact = False
    normals_drawn: dict[str, int]
    bytes_moved: dict[str, int]
    bytes_held = 0

    @abstractmethod
    def perturb(self, seed: int, eps: float) -> None:
        """Moves the weights from ``w`` to ``w + eps z``."""

    @abstractmethod
    def flip(self, seed: int, eps: float) -> None:
        """Moves the weights from ``w + eps z`` to ``w - eps z``."""

    @abstractmethod
    def update(self, seed: int, eps: float, c: float) -> None:
        """Moves the weights from ``w - eps z`` to ``w - c z``."""

    @abstractmethod
    def noise(self, seed: int) -> Iterator[Tensor]:
        """Yields ``z`` of each parameter, computed without the row's operations.

        Each tensor is flat and float32. It is 0 at the elements that the row does not move.
        """

    def prepare(self, seed: int, eps: float, c: float) -> None:  # noqa: B027
        """Sends the values of a step's operations to the device. It is not part of the measured time."""

    def end_step(self) -> None:  # noqa: B027  most rows have nothing to do here
        """Cleans up after a step, so that another row can use the weights. It is not part of the measured time."""


def masked_offsets(model: nn.Module, mask: SparseMask) -> list[Tensor]:
    """Returns the flat offsets of the masked elements of each parameter, int64 [n_i], on the CPU."""
    bounds = torch.searchsorted(mask.ids, torch.tensor([*mask.table.bases, mask.table.size], device="cpu")).tolist()
    return [
        mask.ids[start:stop] - base
        for base, start, stop in zip(mask.table.bases, bounds, bounds[1:], strict=False)
    ]  # fmt: skip


class _EngineRow(Row):
    """Base of the rows that use this engine's kernels on element tables."""

    exact = True

    def __init__(self, tables: list[ElementTable], values: DeviceValues) -> None:
        self._values = values
        slots, elements = sum(t.slots for t in tables), sum(t.nnz for t in tables)
        master_bytes = 4 * slots
        offset_bytes = sum(_bytes(t.offsets) for t in tables if t.offsets is not None)
        moved = sum(map(table_bytes_moved, tables))
        self.bytes_moved = {"perturb": moved, "flip": moved, "update": moved + master_bytes}
        self.bytes_held = master_bytes + offset_bytes
        normals_kept = values.device.type == "cpu" and all(t.slots <= KEPT_NORMALS for t in tables)
        redrawn = 0 if normals_kept else elements
        self.normals_drawn = {"perturb": elements, "flip": redrawn, "update": redrawn}

    @abstractmethod
    def _perturb(self, seed: Tensor, scale: Tensor) -> None: ...

    @abstractmethod
    def _update(self, seed: Tensor, c: Tensor) -> None: ...

    def prepare(self, seed: int, eps: float, c: float) -> None:
        """See ``Row``."""
        self._values.seed(seed)
        for value in (eps, -eps, c):
            self._values.numbers([value], torch.float32)

    def perturb(self, seed: int, eps: float) -> None:
        self._perturb(self._values.seed(seed), self._values.numbers([eps], torch.float32))

    def flip(self, seed: int, eps: float) -> None:
        self.perturb(seed, -eps)

    def update(self, seed: int, eps: float, c: float) -> None:
        self._update(self._values.seed(seed), self._values.numbers([c], torch.float32))


class _LaunchPerTable(_EngineRow):
    """Base of the rows that launch one kernel per table."""

    def __init__(self, tables: list[ElementTable]) -> None:
        device = tables[0].blocks.device
        super().__init__(tables, DeviceValues(device))
        self._parts = [(table, _masters_of(table), resolve("auto", device)) for table in tables]

    def _perturb(self, seed: Tensor, scale: Tensor) -> None:
        for table, master, backend in self._parts:
            backend.perturb_(table, master, seed, scale)

    def _update(self, seed: Tensor, c: Tensor) -> None:
        for table, master, backend in self._parts:
            backend.update_(table, master, seed, c, applied=None, number=0)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def table_bytes_moved(table: ElementTable) -> int:
    """Returns the bytes that a perturbation of a table's elements must transfer; see ``Row``."""
    offset_bytes = 0 if table.offsets is None else _bytes(table.offsets)
    return 4 * table.slots + offset_bytes + _weight_bytes_moved(table) + _bytes(table.blocks)


def _weight_bytes_moved(table: ElementTable) -> int:
    itemsize = table.weights[0].element_size()
    if table.offsets is None:
        return table.nnz * itemsize  # complete sectors are written: nothing is read
    return 2 * sum(
        _sector_bytes(table.offsets[low:high], itemsize) for _, low, high in table.tensor_slices(0, table.slots)
    )


def _sector_bytes(offsets: Tensor, itemsize: int) -> int:
    """Returns the total size of the sectors that hold the elements at ``offsets``, ascending, of one tensor."""
    return _SECTOR * int(torch.unique_consecutive(offsets.long() * itemsize // _SECTOR).numel())


def _masters_of(table: ElementTable) -> Tensor:
    """Returns new fp32 masters of a table's elements, one per slot."""
    master = torch.zeros(table.slots, dtype=torch.float32, device=table.blocks.device)
    for tensor, low, high in table.tensor_slices(0, table.slots):
        offsets = slice(None) if table.offsets is None else table.offsets[low:high].long()
        master[low:high] = table.weights[tensor][offsets]
    return master


class Engine(_EngineRow):
    """This engine as ``SparseZO`` uses it: one launch for all tensors."""

    def __init__(self, model: nn.Module, mask: SparseMask, backend: str = "auto") -> None:
        self._weights = MaskedWeights(model, mask, backend)
        super().__init__(self._weights.tables(), self._weights.values)
        self._mask, self._params = mask, list(model.parameters())

    def _perturb(self, seed: Tensor, scale: Tensor) -> None:
        self._weights.perturb_(seed, scale)

    def _update(self, seed: Tensor, c: Tensor) -> None:
        self._weights.update_(seed, c)

    def noise(self, seed: int) -> Iterator[Tensor]:
        return _masked_noise(self._mask, self._params, seed)


class PlainTorch(Engine):
    """This engine on a CPU, without numba."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        super().__init__(model, mask, "torch")


class LaunchPerTensor(_LaunchPerTable):
    """This engine's sparse kernels, with one launch per tensor."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        parameters = zip(model.parameters(), mask.table.bases, masked_offsets(model, mask), strict=True)
        super().__init__([build_table([p.detach()], [b], [offsets]) for p, b, offsets in parameters if offsets.numel()])
        self._mask, self._params = mask, list(model.parameters())

    def noise(self, seed: int) -> Iterator[Tensor]:
        return _masked_noise(self._mask, self._params, seed)


def _masked_noise(mask: SparseMask, params: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
    """Yields ``z * m`` of each parameter, from the plain-torch reference of the stream on the CPU."""
    z = stream.normal(seed, mask.ids, backend="torch")
    start = 0
    for p, base in zip(params, mask.table.bases, strict=True):
        out = torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
        stop = int(torch.searchsorted(mask.ids, base + p.numel()))
        out[(mask.ids[start:stop] - base).to(p.device)] = z[start:stop].to(p.device)
        start = stop
        yield out


class DenseFused(_LaunchPerTable):
    """This engine's dense kernels: they draw the noise in registers (on a CPU: in windows) and never store it."""

    def __init__(self, model: nn.Module) -> None:
        weights = [p.detach() for p in model.parameters()]
        bases = list(itertools.accumulate((w.numel() for w in weights), initial=0))
        super().__init__([build_table(weights, bases[:-1], None)])

    def noise(self, seed: int) -> Iterator[Tensor]:
        table = self._parts[0][0]
        for start, count in zip(table.starts, table.counts, strict=False):
            yield table_normals(table, self._values.seed(seed), start, start + count)


class _Additive(Row):
    """Base of the rows without masters.

    Every operation adds a multiple of ``z`` to the weights. The update first undoes the perturbation.
    """

    def __init__(self, model: nn.Module) -> None:
        self._params = list(model.parameters())
        self._generator = torch.Generator(self._params[0].device)
        self._set_costs(sum(p.numel() for p in self._params), 2 * sum(_bytes(p) for p in self._params))

    def _set_costs(self, normals: int, moved: int) -> None:
        """Sets the costs of the operations from the normals drawn and the bytes moved by one addition."""
        self.normals_drawn = {"perturb": normals, "flip": normals, "update": 2 * normals}
        self.bytes_moved = {"perturb": moved, "flip": moved, "update": 2 * moved}

    @abstractmethod
    def _add(self, seed: int, scale: float) -> None:
        """Adds ``scale * z`` to the weights."""

    def perturb(self, seed: int, eps: float) -> None:
        self._add(seed, eps)

    def flip(self, seed: int, eps: float) -> None:
        self._add(seed, -2 * eps)

    def update(self, seed: int, eps: float, c: float) -> None:
        self._add(seed, eps)
        self._add(seed, -c)

    def _draw_normals(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        device = self._params[0].device
        return torch.normal(0.0, 1.0, size=tuple(shape), generator=self._generator, dtype=dtype, device=device)

    def noise(self, seed: int) -> Iterator[Tensor]:
        self._generator.manual_seed(seed)
        for p in self._params:
            yield self._draw_normals(p.shape, p.dtype).reshape(-1).float()


class MeZO(_Additive):
    """MeZO: draws a tensor of normals per parameter, again in every pass, and adds it out of place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._storage = [p.data for p in self._params]

    def _add(self, seed: int, scale: float) -> None:
        self._generator.manual_seed(seed)
        for p in self._params:
            p.data = p.data + scale * self._draw_normals(p.shape, p.dtype)

    def end_step(self) -> None:
        """Moves the weights back into their original memory: other rows hold its addresses."""
        for p, storage in zip(self._params, self._storage, strict=True):
            p.data = storage.copy_(p.data)


class Foreach(_Additive):
    """Draws a tensor of normals per parameter and adds them all in one call of ``torch._foreach_add_``."""

    def _add(self, seed: int, scale: float) -> None:
        self._generator.manual_seed(seed)
        z = [self._draw_normals(p.shape, p.dtype) for p in self._params]
        torch._foreach_add_([p.data for p in self._params], z, alpha=scale)


class FlatNoise(_Additive):
    """DeComFL: draws one flat noise vector per step and keeps it until the step ends."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        d = self.normals_drawn["perturb"]
        moved = self.bytes_moved["perturb"] * 3 // 2  # weights read and written; noise written (perturb) or read
        self.normals_drawn = {"perturb": d, "flip": 0, "update": 0}
        self.bytes_moved = {"perturb": moved, "flip": moved, "update": 2 * moved}
        self._z: Tensor | None = None

    def perturb(self, seed: int, eps: float) -> None:
        self._generator.manual_seed(seed)
        self._z = self._draw_normals([self.normals_drawn["perturb"]], self._params[0].dtype)
        self._add(seed, eps)

    def _add(self, seed: int, scale: float) -> None:
        assert self._z is not None
        for p, z in zip(self._params, self._z.split([p.numel() for p in self._params]), strict=True):
            p.data.add_(z.view(p.shape), alpha=scale)

    def noise(self, seed: int) -> Iterator[Tensor]:
        self._generator.manual_seed(seed)
        z = self._draw_normals([self.normals_drawn["perturb"]], self._params[0].dtype).float()
        return iter(z.split([p.numel() for p in self._params]))

    def end_step(self) -> None:
        """Frees the noise."""
        self._z = None


class MaskedDense(_Additive):
    """Draws noise for every element and multiplies it by the mask."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        super().__init__(model)
        self._masks = []
        for p, offsets in zip(self._params, masked_offsets(model, mask), strict=True):
            is_masked = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
            is_masked[offsets.to(p.device)] = True
            self._masks.append(is_masked.view(p.shape))
        d = self.normals_drawn["perturb"]
        self.bytes_held = d  # the masks: one byte per element
        self._set_costs(d, self.bytes_moved["perturb"] + self.bytes_held)

    def _add(self, seed: int, scale: float) -> None:
        self._generator.manual_seed(seed)
        for p, is_masked in zip(self._params, self._masks, strict=True):
            p.data.add_(self._draw_normals(p.shape, p.dtype).mul_(is_masked), alpha=scale)

    def noise(self, seed: int) -> Iterator[Tensor]:
        """See ``Row``."""
        for z, is_masked in zip(super().noise(seed), self._masks, strict=True):
            yield z * is_masked.view(-1)


class Indexing(_Additive):
    """Reads and writes the masked elements by torch indexing."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        super().__init__(model)
        offsets = zip(self._params, masked_offsets(model, mask), strict=True)
        self._offsets = [of_parameter.to(p.device) for p, of_parameter in offsets]
        sectors = sum(_sector_bytes(o, p.element_size()) for p, o in zip(self._params, self._offsets, strict=True))
        self.bytes_held = 8 * len(mask)  # int64 offsets
        self._set_costs(len(mask), 2 * sectors + self.bytes_held)

    def _add(self, seed: int, scale: float) -> None:
        self._generator.manual_seed(seed)
        for p, offsets in zip(self._params, self._offsets, strict=True):
            p.data.view(-1)[offsets] += scale * self._draw_normals(offsets.shape, p.dtype)

    def noise(self, seed: int) -> Iterator[Tensor]:
        self._generator.manual_seed(seed)
        for p, offsets in zip(self._params, self._offsets, strict=True):
            z = torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
            z[offsets] = self._draw_normals(offsets.shape, p.dtype).float()
            yield z


SPARSE: dict[str, Callable[[nn.Module, SparseMask], Row]] = {
    "meerkat": Engine,
    "meerkat, a launch per tensor": LaunchPerTensor,
    "torch indexing": Indexing,
}
# Measured at one density only: what these rows show does not depend on it.
SPARSE_ONCE: dict[str, Callable[[nn.Module, SparseMask], Row]] = {
    "meerkat, plain torch": PlainTorch,
    "dense noise, then the mask": MaskedDense,
}
DENSE: dict[str, Callable[[nn.Module], Row]] = {
    "dense, fused noise": DenseFused,
    "dense, MeZO's loop": MeZO,
    "dense, torch._foreach": Foreach,
    "dense, one flat noise vector": FlatNoise,
}

__all__ = ["DENSE", "OPERATIONS", "SPARSE", "SPARSE_ONCE", "Row", "masked_offsets", "table_bytes_moved"]
