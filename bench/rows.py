"""The ways to move weights along a seeded perturbation, side by side: this engine and those it is compared with.

A row works on a model's own parameters. Its three operations are the passes over the weights that a step makes:

    perturb   w + eps z
    flip      w - eps z, coming from w + eps z
    update    w - c z, coming from w - eps z

The dense rows are written from their descriptions: MeZO (arXiv 2305.17333, algorithm 1), DeComFL (arXiv 2405.15861).
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
from ..triton_kernels.reference import normals_of

OPERATIONS = ("perturb", "flip", "update")
_SECTOR = 32  # bytes that memory moves at least


class Row(ABC):
    """One way.

    Attributes:
        exact: whether the operations' bits are specified; otherwise they are checked within rounding.
        normals: normals drawn by each operation.
        moved: bytes that each operation must move: every 32-byte sector once in if it is read or written in part, once
            out if it is written. Temporaries are not counted.
        held: bytes held from step to step beside the weights.
    """

    exact = False
    normals: dict[str, int]
    moved: dict[str, int]
    held = 0

    @abstractmethod
    def perturb(self, seed: int, eps: float) -> None:
        """See the module."""

    @abstractmethod
    def flip(self, seed: int, eps: float) -> None:
        """See the module."""

    @abstractmethod
    def update(self, seed: int, eps: float, c: float) -> None:
        """See the module."""

    @abstractmethod
    def noise(self, seed: int) -> Iterator[Tensor]:
        """``z`` of each parameter by another way, flat float32, 0 where the row moves nothing."""

    def settle(self) -> None:  # noqa: B027  most rows have nothing to do here
        """What a row has to put in order after a step before another may use the weights; not part of its time."""


def places_of(model: nn.Module, mask: SparseMask) -> list[Tensor]:
    """Flat offsets of the masked elements of each parameter, int64 [n_i], on the CPU."""
    bounds = torch.searchsorted(mask.ids, torch.tensor([*mask.table.bases, mask.table.size])).tolist()
    return [
        mask.ids[start:stop] - base
        for base, start, stop in zip(mask.table.bases, bounds, bounds[1:], strict=False)
    ]  # fmt: skip


class _Kernels(Row):
    """This engine's operations on some tables."""

    exact = True

    def __init__(self, tables: list[ElementTable], values: DeviceValues) -> None:
        self._values = values
        slots, k = sum(t.slots for t in tables), sum(t.nnz for t in tables)
        indices = sum(_bytes(t.offsets) for t in tables if t.offsets is not None)
        moved = 4 * slots + indices + sum(_weights_moved(t) + _bytes(t.blocks) for t in tables)
        self.moved = {"perturb": moved, "flip": moved, "update": moved + 4 * slots}
        self.held = 4 * slots + indices
        kept = values.device.type == "cpu" and all(t.slots <= KEPT_NORMALS for t in tables)
        self.normals = {"perturb": k, "flip": 0 if kept else k, "update": 0 if kept else k}

    @abstractmethod
    def _perturb(self, seed: Tensor, scale: Tensor) -> None: ...

    @abstractmethod
    def _update(self, seed: Tensor, c: Tensor) -> None: ...

    def perturb(self, seed: int, eps: float) -> None:
        self._perturb(self._values.seed(seed), self._values.numbers([eps], torch.float32))

    def flip(self, seed: int, eps: float) -> None:
        self.perturb(seed, -eps)

    def update(self, seed: int, eps: float, c: float) -> None:
        self._update(self._values.seed(seed), self._values.numbers([c], torch.float32))


class _PerTable(_Kernels):
    """One launch a table."""

    def __init__(self, tables: list[ElementTable]) -> None:
        device = tables[0].blocks.device
        super().__init__(tables, DeviceValues(device))
        self._parts = [(table, _masters(table), resolve("auto", device)) for table in tables]

    def _perturb(self, seed: Tensor, scale: Tensor) -> None:
        for table, master, backend in self._parts:
            backend.perturb_(table, master, seed, scale)

    def _update(self, seed: Tensor, c: Tensor) -> None:
        for table, master, backend in self._parts:
            backend.update_(table, master, seed, c)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _weights_moved(table: ElementTable) -> int:
    itemsize = table.weights[0].element_size()
    if table.offsets is None:
        return table.nnz * itemsize  # written in whole sectors: nothing has to come in
    return 2 * sum(_sectors(table.offsets[low:high], itemsize) for _, low, high in table.pieces(0, table.slots))


def _sectors(offsets: Tensor, itemsize: int) -> int:
    """Bytes of the sectors that some ascending offsets into one tensor lie in."""
    return _SECTOR * int(torch.unique_consecutive(offsets.long() * itemsize // _SECTOR).numel())


def _masters(table: ElementTable) -> Tensor:
    master = torch.zeros(table.slots, device=table.blocks.device)
    for tensor, low, high in table.pieces(0, table.slots):
        at = slice(None) if table.offsets is None else table.offsets[low:high].long()
        master[low:high] = table.weights[tensor][at]
    return master


class Engine(_Kernels):
    """This engine, as its optimizer uses it: one launch for all tensors."""

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
    """This engine on a CPU without numba."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        super().__init__(model, mask, "torch")


class LaunchPerTensor(_PerTable):
    """This engine's sparse kernels, launched for every tensor on its own."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        found = zip(model.parameters(), mask.table.bases, places_of(model, mask), strict=True)
        super().__init__([build_table([p.detach()], [base], [at]) for p, base, at in found if at.numel()])
        self._mask, self._params = mask, list(model.parameters())

    def noise(self, seed: int) -> Iterator[Tensor]:
        return _masked_noise(self._mask, self._params, seed)


def _masked_noise(mask: SparseMask, params: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
    """The stream's ``z * m`` of each parameter, by the plain-torch reference on the CPU."""
    z = stream.normal(seed, mask.ids, backend="torch")
    at = 0
    for p, base in zip(params, mask.table.bases, strict=True):
        out = torch.zeros(p.numel(), device=p.device)
        stop = int(torch.searchsorted(mask.ids, base + p.numel()))
        out[(mask.ids[at:stop] - base).to(p.device)] = z[at:stop].to(p.device)
        at = stop
        yield out


class DenseFused(_PerTable):
    """All elements with this engine's dense kernels: noise made in registers (on a CPU: in windows), never stored."""

    def __init__(self, model: nn.Module) -> None:
        weights = [p.detach() for p in model.parameters()]
        bases = list(itertools.accumulate((w.numel() for w in weights), initial=0))
        super().__init__([build_table(weights, bases[:-1], None)])

    def noise(self, seed: int) -> Iterator[Tensor]:
        table = self._parts[0][0]
        for start, count in zip(table.starts, table.counts, strict=False):
            yield normals_of(table, self._values.seed(seed), start, start + count)


class _Additive(Row):
    """Rows that keep no masters: every operation adds a multiple of ``z``, the update first undoes the perturbation."""

    def __init__(self, model: nn.Module) -> None:
        self._params = list(model.parameters())
        self._generator = torch.Generator(self._params[0].device)
        self._set(sum(p.numel() for p in self._params), 2 * sum(_bytes(p) for p in self._params))

    def _set(self, normals: int, moved: int) -> None:
        self.normals = {"perturb": normals, "flip": normals, "update": 2 * normals}
        self.moved = {"perturb": moved, "flip": moved, "update": 2 * moved}

    @abstractmethod
    def _add(self, seed: int, scale: float) -> None:
        """``w + scale * z``."""

    def perturb(self, seed: int, eps: float) -> None:
        self._add(seed, eps)

    def flip(self, seed: int, eps: float) -> None:
        self._add(seed, -2 * eps)

    def update(self, seed: int, eps: float, c: float) -> None:
        self._add(seed, eps)
        self._add(seed, -c)

    def _normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        device = self._params[0].device
        return torch.normal(0.0, 1.0, size=tuple(shape), generator=self._generator, dtype=dtype, device=device)

    def noise(self, seed: int) -> Iterator[Tensor]:
        self._generator.manual_seed(seed)
        for p in self._params:
            yield self._normal(p.shape, p.dtype).reshape(-1).float()


class MeZO(_Additive):
    """A normal tensor for each parameter, out of place, drawn anew for every pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._own = [p.data for p in self._params]

    def _add(self, seed: int, scale: float) -> None:
        self._generator.manual_seed(seed)
        for p in self._params:
            p.data = p.data + scale * self._normal(p.shape, p.dtype)

    def settle(self) -> None:
        """Gives the weights their own memory back: other rows hold its addresses."""
        for p, own in zip(self._params, self._own, strict=True):
            p.data = own.copy_(p.data)


class Foreach(_Additive):
    """A normal tensor for each parameter, all added in one call of ``torch._foreach_add_``."""

    def _add(self, seed: int, scale: float) -> None:
        self._generator.manual_seed(seed)
        z = [self._normal(p.shape, p.dtype) for p in self._params]
        torch._foreach_add_([p.data for p in self._params], z, alpha=scale)


class FlatNoise(_Additive):
    """DeComFL: one flat noise vector, drawn once a step and kept to its end."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        d, once = self.normals["perturb"], self.moved["perturb"] * 3 // 2  # the weights in and out, the noise one way
        self.normals = {"perturb": d, "flip": 0, "update": 0}
        self.moved = {"perturb": once, "flip": once, "update": 2 * once}
        self._z: Tensor | None = None

    def perturb(self, seed: int, eps: float) -> None:
        self._generator.manual_seed(seed)
        self._z = self._normal([self.normals["perturb"]], self._params[0].dtype)
        self._add(seed, eps)

    def _add(self, seed: int, scale: float) -> None:
        assert self._z is not None
        for p, z in zip(self._params, self._z.split([p.numel() for p in self._params]), strict=True):
            p.data.add_(z.view(p.shape), alpha=scale)

    def noise(self, seed: int) -> Iterator[Tensor]:
        self._generator.manual_seed(seed)
        z = self._normal([self.normals["perturb"]], self._params[0].dtype).float()
        return iter(z.split([p.numel() for p in self._params]))

    def settle(self) -> None:
        """The noise goes with the step."""
        self._z = None


class MaskedDense(_Additive):
    """Noise for every element, times the mask."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        super().__init__(model)
        self._masks = []
        for p, offsets in zip(self._params, places_of(model, mask), strict=True):
            own = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
            own[offsets.to(p.device)] = True
            self._masks.append(own.view(p.shape))
        self.held = self.normals["perturb"]
        self._set(self.held, self.moved["perturb"] + self.held)

    def _add(self, seed: int, scale: float) -> None:
        self._generator.manual_seed(seed)
        for p, own in zip(self._params, self._masks, strict=True):
            p.data.add_(self._normal(p.shape, p.dtype).mul_(own), alpha=scale)

    def noise(self, seed: int) -> Iterator[Tensor]:
        """See ``Row``."""
        for z, own in zip(super().noise(seed), self._masks, strict=True):
            yield z * own.view(-1)


class Indexing(_Additive):
    """The masked elements by torch indexing."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        super().__init__(model)
        self._offsets = [offsets.to(p.device) for p, offsets in zip(self._params, places_of(model, mask), strict=True)]
        sectors = sum(_sectors(o, p.element_size()) for p, o in zip(self._params, self._offsets, strict=True))
        self.held = 8 * len(mask)
        self._set(len(mask), 2 * sectors + self.held)

    def _add(self, seed: int, scale: float) -> None:
        self._generator.manual_seed(seed)
        for p, offsets in zip(self._params, self._offsets, strict=True):
            p.data.view(-1)[offsets] += scale * self._normal(offsets.shape, p.dtype)

    def noise(self, seed: int) -> Iterator[Tensor]:
        self._generator.manual_seed(seed)
        for p, offsets in zip(self._params, self._offsets, strict=True):
            z = torch.zeros(p.numel(), device=p.device)
            z[offsets] = self._normal(offsets.shape, p.dtype).float()
            yield z


SPARSE: dict[str, Callable[[nn.Module, SparseMask], Row]] = {
    "meerkat": Engine,
    "meerkat, a launch per tensor": LaunchPerTensor,
    "torch indexing": Indexing,
}
# What these show does not depend on the density: one is enough.
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

__all__ = ["DENSE", "OPERATIONS", "SPARSE", "SPARSE_ONCE", "Row", "places_of"]
