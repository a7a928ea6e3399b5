"""``SparseMask``: the static set of elements that perturbations and updates touch; how it is chosen, saved and checked.

File: safetensors with ``ids`` int64 [k], and where known ``scores`` and ``gradient`` float32 [k]; everything else is
metadata, and a checksum covers it all (see ``docs/formats.md``).
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import sensitivity, stream
from .checksummed import FileKind, read_checksummed, write_checksummed
from .errors import MaskError
from .parameters import ParameterTable, floating_parameters
from .sensitivity import LossFunction

_KIND = FileKind(
    name="mask",
    format="meerkat-mask/2",
    keys=frozenset({"density", "source", "calibration", "d", "table", "table_digest", "digest"}),
    tensors={"ids": "I64", "gradient": "F32", "scores": "F32"},
    optional=frozenset({"gradient", "scores"}),
    error=MaskError,
    remedy="make it anew with `meerkat-engine mask`",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseMask:
    """A static binary mask over the elements of one model.

    Build one with ``from_gradients``, ``magnitude``, ``random``, ``dense`` or ``of_parameters``, or ``load`` it.

    Args:
        ids: int64 [k] on the CPU, ascending element ids.
        table: of the model it was made for.
        density: ``u`` in (0, 1], as asked for; ``k = round(u * d)``, at least 1.
        source: how the elements were chosen.
        calibration: what text they were chosen on, or the gradient taken on, in words; empty where none was needed.
        gradient: float32 [k], mean gradient on the calibration text at these elements, or None.
        scores: float32 [k], what the elements were ranked by, or None.

    Raises:
        MaskError: if the ids are not ascending, unique, and within the model.
    """

    ids: Tensor
    table: ParameterTable
    density: float
    source: str
    calibration: str = ""
    gradient: Tensor | None = field(default=None, repr=False)
    scores: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.ids.dtype != torch.int64 or self.ids.dim() != 1 or self.ids.numel() == 0:
            raise MaskError(f"mask ids must be int64 [k] with k > 0, got {self.ids.dtype} {list(self.ids.shape)}")
        if self.ids[0] < 0 or self.ids[-1] >= self.table.size:
            raise MaskError(f"mask ids must be in [0, {self.table.size}), got {self.ids[0]} to {self.ids[-1]}")
        wrong = torch.nonzero(self.ids[1:] <= self.ids[:-1])
        if wrong.numel():
            at = int(wrong[0]) + 1
            raise MaskError(f"mask ids must ascend; position {at} holds {self.ids[at]} after {self.ids[at - 1]}")
        for name, values in (("gradient", self.gradient), ("scores", self.scores)):
            if values is not None and (values.shape != self.ids.shape or values.dtype != torch.float32):
                raise MaskError(f"mask {name} must be float32 [{len(self)}], got {values.dtype} {list(values.shape)}")

    def __len__(self) -> int:
        return self.ids.numel()

    @property
    def digest(self) -> str:
        """SHA-256 of the ids and the model's parameter table, in hexadecimal: equal masks select the same elements."""
        digest = hashlib.sha256(self.table.digest.encode())
        digest.update(self.ids.numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_gradients(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        density: float = 1e-3,
        *,
        loss: LossFunction | None = None,
        source: str = "sensitivity",
        calibration: str = "",
    ) -> "SparseMask":
        """The elements with the largest mean squared gradient over some batches.

        Args:
            model: left as it was.
            batches: of calibration text: int64 token ids [B, L], or mappings with ``input_ids`` and ``attention_mask``.
            density: ``u`` in (0, 1].
            loss: of the model on one batch; None is the language-model loss of a transformers causal LM.
            source: name of the method, kept with the mask.
            calibration: description of the text, kept with the mask.

        Raises:
            MaskError: for a density out of range, no batch, or a loss or gradient that is not finite.

        References:
            Meerkat, arXiv 2506.03337, section 3.
        """
        table = ParameterTable.of(model)
        k = element_count(density, table.size)
        found = sensitivity.accumulate(model, batches, loss)
        ids, scores = sensitivity.largest(lambda i: found.squares[i].view(-1), len(table.names), k)
        return cls(
            ids=ids,
            table=table,
            density=density,
            source=source,
            calibration=calibration or f"{found.batches} batches",
            gradient=values_at_ids(found.means, table, ids),
            scores=scores,
        )

    def with_gradient(
        self, model: nn.Module, batches: Iterable[Any], *, loss: LossFunction | None = None, calibration: str = ""
    ) -> "SparseMask":
        """The same mask with the mean gradient over some batches, which GradIP needs.

        Memory: one parameter's gradient at a time, and 4 bytes a masked element. Parameters without masked elements
        get no gradient.

        Args:
            model: the mask's; left as it was.
            batches: as for ``from_gradients``.
            loss: as for ``from_gradients``.
            calibration: description of the text; empty keeps the one there is.

        Raises:
            MaskError: if the mask is another model's, there is no batch, or a loss or gradient is not finite.
        """
        self.check(model)
        wanted = {name: self.ids[start:stop] - base for name, base, start, stop in self.ranges()}
        found = sensitivity.gradient_at(model, batches, loss, wanted)
        return replace(self, gradient=torch.cat(found), calibration=calibration or self.calibration)

    def ranges(self) -> list[tuple[str, int, int, int]]:
        """Name, base id, begin and end in ``ids`` of every parameter that has masked elements, in id order."""
        return self.table.ranges(self.ids)

    @classmethod
    def magnitude(cls, model: nn.Module, density: float) -> "SparseMask":
        """The elements with the largest absolute weight."""
        table = ParameterTable.of(model)
        weights = [p.detach() for _, p in floating_parameters(model)]
        k = element_count(density, table.size)
        ids, scores = sensitivity.largest(lambda i: weights[i].reshape(-1).float().abs(), len(weights), k)
        return cls(ids=ids, table=table, density=density, source="magnitude", scores=scores)

    @classmethod
    def random(cls, model: nn.Module, density: float, seed: int) -> "SparseMask":
        """Elements at random; of one seed, a sparser mask is part of a denser one (up to density one half)."""
        table = ParameterTable.of(model)
        k = element_count(density, table.size)
        if 2 * k <= table.size:
            ids = stream.distinct(seed, k, table.size)
        else:  # draw what is left out
            chosen = torch.ones(table.size, dtype=torch.bool)
            chosen[stream.distinct(seed, table.size - k, table.size)] = False
            ids = torch.nonzero(chosen).view(-1)
        return cls(ids=ids, table=table, density=density, source=f"random, seed {seed}")

    @classmethod
    def dense(cls, model: nn.Module) -> "SparseMask":
        """All elements: zeroth-order fine-tuning without a mask, with 20 bytes of state an element."""
        table = ParameterTable.of(model)
        return cls(ids=torch.arange(table.size), table=table, density=1.0, source="dense")

    @classmethod
    def of_parameters(cls, model: nn.Module, names: Sequence[str], source: str = "parameters") -> "SparseMask":
        """All elements of some parameters: adapters, one layer.

        Args:
            model: the model.
            names: of the parameters, as in ``model.named_parameters()``, in any order.
            source: how they were chosen, kept with the mask.

        Raises:
            MaskError: naming the first that the model has not, or if there is none.
        """
        table = ParameterTable.of(model)
        known = dict(zip(table.names, zip(table.bases, table.shapes, strict=True), strict=True))
        for name in names:
            if name not in known:
                raise MaskError(
                    f"the model has no floating-point parameter {name!r}; it has {len(known)}, {table.names[0]!r} to "
                    f"{table.names[-1]!r} (a tied parameter has one name)"
                )
        if not names:
            raise MaskError("a mask of parameters needs at least one parameter name")
        places = sorted(known[name] for name in set(names))
        ids = torch.cat([torch.arange(base, base + torch.Size(shape).numel()) for base, shape in places])
        return cls(ids=ids, table=table, density=ids.numel() / table.size, source=source)

    def check(self, model: nn.Module) -> None:
        """Raises ``MaskError`` naming the first difference if the mask was made for another model."""
        difference = self.table.difference(ParameterTable.of(model))
        if difference is not None:
            raise MaskError(f"the mask was made for another model: {difference}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the mask to a safetensors file, whole or not at all; raises ``RunError`` if it cannot."""
        tensors = {"ids": self.ids}
        if self.gradient is not None:
            tensors["gradient"] = self.gradient
        if self.scores is not None:
            tensors["scores"] = self.scores
        metadata = {
            "density": repr(self.density),
            "source": self.source,
            "calibration": self.calibration,
            "table": self.table.to_json(),
        }
        write_checksummed(path, _KIND, tensors, metadata | self._derived())

    def to_bytes(self) -> bytes:
        """What ``save`` writes, to be sent elsewhere."""
        with tempfile.TemporaryDirectory() as directory:
            self.save(path := Path(directory, "mask.safetensors"))
            return path.read_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, model: nn.Module | None = None) -> "SparseMask":
        """Reads what ``to_bytes`` gave, or a file's content; arguments and errors are those of ``load``."""
        with tempfile.TemporaryDirectory() as directory:  # safetensors reads metadata from files alone
            path = Path(directory, "mask.safetensors")
            path.write_bytes(data)
            return cls.load(path, model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> "SparseMask":
        """Reads a mask.

        Args:
            path: of the file.
            model: to check the mask against, or None.

        Raises:
            MaskError: if the file is missing, damaged or of another format, or the mask is another model's.
        """
        metadata, tensors = read_checksummed(path, _KIND)
        try:
            mask = cls(
                ids=tensors["ids"],
                table=ParameterTable.from_json(metadata["table"]),
                density=float(metadata["density"]),
                source=metadata["source"],
                calibration=metadata["calibration"],
                gradient=tensors.get("gradient"),
                scores=tensors.get("scores"),
            )
        except ValueError as error:
            raise MaskError(f"the mask {os.fspath(path)!r} is damaged: {error}") from error
        for key, value in mask._derived().items():
            if metadata[key] != value:
                raise MaskError(f"the mask {os.fspath(path)!r} is damaged: its {key} is not that of its ids and table")
        if model is not None:
            mask.check(model)
        return mask

    def _derived(self) -> dict[str, str]:
        """Metadata that follows from ids and table, for those who read a file without this package."""
        return {"d": str(self.table.size), "table_digest": self.table.digest, "digest": self.digest}


def check_density(density: float) -> None:
    """Raises ``MaskError`` unless the density is in (0, 1]."""
    if not 0 < density <= 1:
        raise MaskError(f"density must be in (0, 1], got {density}")


def element_count(density: float, size: int) -> int:
    """``k = round(u * d)``, at least 1."""
    check_density(density)
    return max(1, round(density * size))


def values_at_ids(tensors: list[Tensor], table: ParameterTable, ids: Tensor) -> Tensor:
    """Values of chosen elements from a tensor for every parameter: [k] on the CPU."""
    of = dict(zip(table.names, tensors, strict=True))
    return torch.cat(
        [
            of[name].view(-1)[(ids[start:stop] - base).to(of[name].device)].cpu()
            for name, base, start, stop in table.ranges(ids)
        ]
    )


__all__ = ["SparseMask", "check_density", "element_count", "values_at_ids"]
