"""``SparseMask``: the static set of elements that perturbations and updates change. Builds, saves, loads and checks it.

File: safetensors with ``ids`` int64 [k] and optionally ``scores`` and ``gradient`` float32 [k]. Everything else is
metadata. A checksum covers tensors and metadata (see ``docs/formats.md``).
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
    remedy="create a new one with `meerkat-engine mask`",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseMask:
    """A static binary mask over the elements of one model.

    Build a mask with ``from_gradients``, ``magnitude``, ``random``, ``dense`` or ``of_parameters``, or ``load`` one.

    Args:
        ids: element ids, int64 [k] on the CPU, ascending.
        table: parameter table of the model that the mask was made for.
        density: requested density ``u`` in (0, 1]; ``k = round(u * d)``, at least 1.
        source: name of the method that chose the elements.
        calibration: description of the text used to choose the elements or to compute ``gradient``; empty if no text
            was used.
        gradient: mean gradient on the calibration text at the masked elements, float32 [k], or None.
        scores: scores that ranked the elements, float32 [k], or None.

    Raises:
        MaskError: if the density is out of range, the ids are not ascending, unique and within the model, or a tensor
            has the wrong dtype or shape.
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
        not_ascending = torch.nonzero(self.ids[1:] <= self.ids[:-1])
        if not_ascending.numel():
            position = int(not_ascending[0]) + 1
            raise MaskError(
                f"mask ids must ascend; position {position} holds {self.ids[position]} after {self.ids[position - 1]}"
            )
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
        """Masks the elements with the largest mean squared gradient over calibration batches.

        Args:
            model: the model to make the mask for; unchanged afterwards.
            batches: batches of calibration text: int64 token ids [B, L], or mappings with ``input_ids`` and
                ``attention_mask``.
            density: ``u`` in (0, 1].
            loss: computes the model's loss on one batch, a scalar. None uses the language-model loss of a transformers
                causal LM.
            source: name of the method, stored in the mask.
            calibration: description of the text, stored in the mask. Empty stores the number of batches.

        Raises:
            MaskError: if the density is out of range, there is no batch, or a loss or gradient is not finite.

        References:
            Meerkat, arXiv 2506.03337, section 3.
        """
        table = ParameterTable.of(model)
        k = element_count(density, table.size)
        gradients = sensitivity.accumulate_gradients(model, batches, loss)
        ids, scores = sensitivity.select_largest(lambda i: gradients.squares[i].view(-1), len(table.names), k)
        return cls(
            ids=ids,
            table=table,
            density=density,
            source=source,
            calibration=calibration or f"{gradients.batches} batches",
            gradient=values_at_ids(gradients.means, table, ids),
            scores=scores,
        )

    def with_gradient(
        self, model: nn.Module, batches: Iterable[Any], *, loss: LossFunction | None = None, calibration: str = ""
    ) -> "SparseMask":
        """Returns the same mask with the mean gradient over calibration batches, which GradIP needs.

        Memory: one parameter's gradient at a time, and 4 bytes per masked element. Parameters without masked elements
        get no gradient.

        Args:
            model: the model that the mask was made for; unchanged afterwards.
            batches: calibration batches, see ``from_gradients``.
            loss: loss function, see ``from_gradients``.
            calibration: description of the text; empty keeps the mask's present description.

        Raises:
            MaskError: if the mask was made for another model, there is no batch, or a loss or gradient is not finite.
        """
        self.check(model)
        offsets = {name: self.ids[start:stop] - base for name, base, start, stop in self.ranges()}
        gradients = sensitivity.gradient_at(model, batches, loss, offsets)
        return replace(self, gradient=torch.cat(gradients), calibration=calibration or self.calibration)

    def ranges(self) -> list[tuple[str, int, int, int]]:
        """Locates each parameter's elements in ``ids``: (name, base id, start, stop), in id order.

        Only parameters with masked elements are listed. Their ids are ``ids[start:stop]``.
        """
        return self.table.ranges(self.ids)

    @classmethod
    def magnitude(cls, model: nn.Module, density: float) -> "SparseMask":
        """Masks the elements with the largest absolute weight."""
        table = ParameterTable.of(model)
        weights = [p.detach() for _, p in floating_parameters(model)]
        k = element_count(density, table.size)
        ids, scores = sensitivity.select_largest(lambda i: weights[i].reshape(-1).float().abs(), len(weights), k)
        return cls(ids=ids, table=table, density=density, source="magnitude", scores=scores)

    @classmethod
    def random(cls, model: nn.Module, density: float, seed: int) -> "SparseMask":
        """Masks random elements. With the same seed, a sparser mask is a subset of a denser one, up to density 0.5."""
        table = ParameterTable.of(model)
        k = element_count(density, table.size)
        if 2 * k <= table.size:
            ids = stream.distinct(seed, k, table.size)
        else:  # draw the elements to leave out: they are fewer
            chosen = torch.ones(table.size, dtype=torch.bool)
            chosen[stream.distinct(seed, table.size - k, table.size)] = False
            ids = torch.nonzero(chosen).view(-1)
        return cls(ids=ids, table=table, density=density, source=f"random, seed {seed}")

    @classmethod
    def dense(cls, model: nn.Module) -> "SparseMask":
        """Masks all elements, for dense zeroth-order fine-tuning. The ids need 8 bytes per element."""
        table = ParameterTable.of(model)
        return cls(ids=torch.arange(table.size), table=table, density=1.0, source="dense")

    @classmethod
    def of_parameters(cls, model: nn.Module, names: Sequence[str], source: str = "parameters") -> "SparseMask":
        """Masks all elements of the named parameters, for example adapters or one layer.

        Args:
            model: the model to make the mask for.
            names: parameter names as in ``model.named_parameters()``, in any order.
            source: name of the method, stored in the mask.

        Raises:
            MaskError: if ``names`` is empty or the model lacks one of the parameters; it names the first such one.
        """
        table = ParameterTable.of(model)
        locations = dict(zip(table.names, zip(table.bases, table.shapes, strict=True), strict=True))
        for name in names:
            if name not in locations:
                raise MaskError(
                    f"the model has no floating-point parameter {name!r}; it has {len(locations)} parameters, "
                    f"{table.names[0]!r} to {table.names[-1]!r} (tied parameters share one name)"
                )
        if not names:
            raise MaskError("a mask of parameters needs at least one parameter name")
        selected = sorted(locations[name] for name in set(names))
        ids = torch.cat([torch.arange(base, base + torch.Size(shape).numel()) for base, shape in selected])
        return cls(ids=ids, table=table, density=ids.numel() / table.size, source=source)

    def check(self, model: nn.Module) -> None:
        """Raises ``MaskError`` with the first difference if the mask was made for another model."""
        difference = self.table.difference(ParameterTable.of(model))
        if difference is not None:
            raise MaskError(f"the mask was made for another model: {difference}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the mask to a safetensors file atomically.

        Args:
            path: path of the file.

        Raises:
            RunError: if the file cannot be written.
        """
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
        """Serializes the mask: the bytes that ``save`` writes."""
        with tempfile.TemporaryDirectory() as directory:
            self.save(path := Path(directory, "mask.safetensors"))
            return path.read_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, model: nn.Module | None = None) -> "SparseMask":
        """Reads a mask from the result of ``to_bytes`` or the content of a mask file.

        Args:
            data: the bytes.
            model: model to check the mask against, or None for no check.

        Raises:
            MaskError: see ``load``.
        """
        with tempfile.TemporaryDirectory() as directory:  # safetensors reads metadata only from files
            path = Path(directory, "mask.safetensors")
            path.write_bytes(data)
            return cls.load(path, model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> "SparseMask":
        """Reads a mask file.

        Args:
            path: path of the file.
            model: model to check the mask against, or None for no check.

        Raises:
            MaskError: if the file is missing, damaged or of another format, or the mask was made for another model.
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
                raise MaskError(f"the mask {os.fspath(path)!r} is damaged: its {key} does not match its ids and table")
        if model is not None:
            mask.check(model)
        return mask

    def _derived(self) -> dict[str, str]:
        """Metadata derived from ids and table, for readers of the file that do not use this package."""
        return {"d": str(self.table.size), "table_digest": self.table.digest, "digest": self.digest}


def check_density(density: float) -> None:
    """Raises ``MaskError`` unless the density is in (0, 1]."""
    if not 0 < density <= 1:
        raise MaskError(f"density must be in (0, 1], got {density}")


def element_count(density: float, size: int) -> int:
    """Number of masked elements: ``k = round(u * d)``, at least 1.

    Args:
        density: ``u`` in (0, 1].
        size: ``d``, the model's number of elements.

    Raises:
        MaskError: if the density is out of range.
    """
    check_density(density)
    return max(1, round(density * size))


def values_at_ids(tensors: list[Tensor], table: ParameterTable, ids: Tensor) -> Tensor:
    """Gathers the values of chosen elements.

    Args:
        tensors: one tensor per parameter of the table, with the parameter's shape.
        table: the model's parameter table.
        ids: ascending element ids, int64 [k] on the CPU.

    Returns:
        Values at the ids, [k] on the CPU.
    """
    by_name = dict(zip(table.names, tensors, strict=True))
    values = []
    for name, base, start, stop in table.ranges(ids):
        tensor = by_name[name]
        values.append(tensor.view(-1)[(ids[start:stop] - base).to(tensor.device)].cpu())
    return torch.cat(values)


__all__ = ["SparseMask", "check_density", "element_count", "values_at_ids"]
