"""``SparseMask``: the static set of elements that perturbations and updates change. Builds, saves, loads and checks it.

File: safetensors with ``ids`` int64 [k] and optionally ``scores`` and ``gradient`` float32 [k]. Everything else is
metadata. A checksum covers tensors and metadata (see ``docs/formats.md``).
"""

import hashlib
import os
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import sensitivity, stream
from .checksummed import FileKind, read_checksummed, write_checksummed
from .eligible import base_ids, check_density, element_count, element_ids, eligible_parameters
from .errors import MaskError
from .parameters import ParameterTable, check_values
from .ranking import most_sensitive
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

    Build a mask with ``from_gradients``, ``magnitude``, ``random`` or ``dense``, which by default leave out parameters
    that do not require gradients, with ``of_parameters``, which takes what it is told, or ``load`` one. Element ids
    number all floating-point parameters, whether they require gradients or not.

    Args:
        ids: element ids, int64 [k] on the CPU, ascending.
        table: parameter table of the model that the mask was made for.
        density: requested density ``u`` in (0, 1]; ``k = round(u * n)``, at least 1, of n elements to choose from.
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
    _hashed: tuple[int | None, str] | None = field(default=None, init=False, repr=False)  # version of ids, digest

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
        """SHA-256 of the ids and the model's parameter table, in hexadecimal: equal masks select the same elements.

        The ids are hashed once, and again only if they were written since, other than through a NumPy array that shares
        their memory.
        """
        version = None if self.ids.is_inference() else self.ids._version  # inference tensors have none
        if version is None or self._hashed is None or self._hashed[0] != version:
            digest = hashlib.sha256(self.table.digest.encode())
            digest.update(self.ids.contiguous().numpy())  # type: ignore[arg-type]
            object.__setattr__(self, "_hashed", (version, digest.hexdigest()))
        assert self._hashed is not None
        return self._hashed[1]

    @classmethod
    @torch.inference_mode(False)
    def from_gradients(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        density: float = 1e-3,
        *,
        loss: LossFunction | None = None,
        source: str = "sensitivity",
        calibration: str = "",
        frozen: bool = False,
        at_a_time: int | None = None,
    ) -> "SparseMask":
        """Masks the elements with the largest mean squared gradient over calibration batches.

        Works within ``torch.inference_mode`` too. Memory besides the model and the activations: 8 bytes per element to
        choose from, or with ``at_a_time`` for each of that many (at least those of the largest parameter); one
        parameter's gradient at a time, a copy of the buffers, and then at most 80 bytes per masked element (or for each
        of 2**20 elements, if these are more), with ``at_a_time`` twice that and 32 more.

        Args:
            model: the model to make the mask for. Afterwards it is as before, and so are torch's random generators; no
                hook on a parameter runs.
            batches: batches of calibration text: int64 token ids [B, L], or mappings with ``input_ids`` and
                ``attention_mask``. With ``at_a_time`` they are read several times; an iterator is first made a list.
            density: ``u`` in (0, 1].
            loss: computes the model's loss on one batch, a scalar. None uses the language-model loss of a transformers
                causal LM; any other model needs its own loss.
            source: name of the method, stored in the mask.
            calibration: description of the text, stored in the mask. Empty stores the number of batches.
            frozen: whether parameters that do not require gradients can be masked too.
            at_a_time: number of elements whose gradients are accumulated at a time: parameters are taken in groups of
                that many elements at most, each with a forward and a backward pass over all batches. The mask has the
                same bits. None: all in one pass.

        Raises:
            MaskError: if the density or ``at_a_time`` is out of range, there is no batch, a loss or gradient is not
                finite, or no parameter can be masked.
            ModelError: if ``loss`` is None and the model is no causal LM of transformers; if the model is in a wrapper
                (DDP, FSDP) or sharded; or if a parameter is on the meta device, offloaded, or made in inference mode.
            DataError: if ``loss`` is None and a batch has no token to predict.

        References:
            Meerkat, arXiv 2506.03337, section 3.
        """
        table = ParameterTable.of(model)
        names = eligible_parameters(model, frozen).keys()
        k = element_count(density, table.size_of(names))
        best = most_sensitive(model, batches, loss, k, names, at_a_time=at_a_time)
        return cls(
            ids=best.ids,
            table=table,
            density=density,
            source=source,
            calibration=calibration or f"{best.batches} batches",
            gradient=best.gradient,
            scores=best.scores,
        )

    @torch.inference_mode(False)
    def with_gradient(
        self, model: nn.Module, batches: Iterable[Any], *, loss: LossFunction | None = None, calibration: str = ""
    ) -> "SparseMask":
        """Returns the same mask with the mean gradient over calibration batches, which GradIP needs.

        Memory: one parameter's gradient at a time, 4 bytes per masked element, and a copy of the buffers. Parameters
        without masked elements get no gradient.

        Args:
            model: the model that the mask was made for; unchanged afterwards, see ``from_gradients``.
            batches: calibration batches, see ``from_gradients``.
            loss: loss function, see ``from_gradients``.
            calibration: description of the text; empty keeps the mask's present description.

        Raises:
            MaskError: if the mask was made for another model, there is no batch, or a loss or gradient is not finite.
            ModelError: see ``from_gradients``.
            DataError: see ``from_gradients``.
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
    @torch.no_grad()
    def magnitude(cls, model: nn.Module, density: float, *, frozen: bool = False) -> "SparseMask":
        """Masks the elements with the largest absolute weight.

        Args:
            model: the model to make the mask for.
            density: ``u`` in (0, 1].
            frozen: whether parameters that do not require gradients can be masked too.

        Raises:
            MaskError: if the density is out of range, a weight is NaN, or no parameter can be masked.
            ModelError: see ``from_gradients``.
        """
        table = ParameterTable.of(model)
        parameters = eligible_parameters(model, frozen)
        k = element_count(density, table.size_of(parameters))
        for name, parameter in parameters.items():
            check_values(name, parameter)
            if torch.isnan(parameter).any():
                raise MaskError(f"parameter {name!r} contains NaN, which has no magnitude; check the model's weights")
        ids, scores = sensitivity.select_largest(
            list(parameters.values()), k, bases=base_ids(table, parameters), score=lambda weight: weight.float().abs()
        )
        return cls(ids=ids, table=table, density=density, source="magnitude", scores=scores)

    @classmethod
    def random(cls, model: nn.Module, density: float, seed: int, *, frozen: bool = False) -> "SparseMask":
        """Masks random elements. With the same seed, a sparser mask is a subset of a denser one, up to density 0.5.

        Only shapes are read, so the model may be on the meta device. Memory: about 18 bytes per masked element.

        Args:
            model: the model to make the mask for.
            density: ``u`` in (0, 1].
            seed: seed in [0, 2**64).
            frozen: whether parameters that do not require gradients can be masked too.

        Raises:
            MaskError: if the density is out of range, or no parameter can be masked.
            ModelError: if the model is in a wrapper (DDP, FSDP) or sharded.
        """
        table = ParameterTable.of(model)
        names = eligible_parameters(model, frozen).keys()
        size = table.size_of(names)
        k = element_count(density, size)
        if 2 * k <= size:
            positions = stream.distinct(seed, k, size)
        else:  # draw the elements to leave out: they are fewer
            chosen = torch.ones(size, dtype=torch.bool, device="cpu")
            chosen[stream.distinct(seed, size - k, size)] = False
            positions = torch.nonzero(chosen).view(-1)
        ids = element_ids(table, names, positions)
        return cls(ids=ids, table=table, density=density, source=f"random, seed {seed}")

    @classmethod
    def dense(cls, model: nn.Module, *, frozen: bool = False) -> "SparseMask":
        """Masks all elements, for dense zeroth-order fine-tuning. The ids need 8 bytes per element.

        Args:
            model: the model to make the mask for.
            frozen: whether to mask parameters that do not require gradients too.

        Raises:
            MaskError: if no parameter can be masked.
            ModelError: see ``random``.
        """
        table = ParameterTable.of(model)
        names = eligible_parameters(model, frozen).keys()
        return cls(ids=_all_ids(table, names), table=table, density=1.0, source="dense")

    @classmethod
    def of_parameters(cls, model: nn.Module, names: Sequence[str], source: str = "parameters") -> "SparseMask":
        """Masks all elements of the named parameters, for example adapters or one layer; frozen ones too.

        Args:
            model: the model to make the mask for.
            names: parameter names as in ``model.named_parameters()``, in any order.
            source: name of the method, stored in the mask.

        Raises:
            MaskError: if ``names`` is empty or the model lacks one of the parameters; it names the first such one.
            ModelError: see ``random``.
        """
        table = ParameterTable.of(model)
        eligible_parameters(model, frozen=True)
        present = set(table.names)
        for name in names:
            if name not in present:
                raise MaskError(
                    f"the model has no floating-point parameter {name!r}; it has {len(present)} parameters, "
                    f"{table.names[0]!r} to {table.names[-1]!r} (tied parameters share one name)"
                )
        if not names:
            raise MaskError("a mask of parameters needs at least one parameter name")
        ids = _all_ids(table, set(names))
        return cls(ids=ids, table=table, density=ids.numel() / table.size, source=source)

    def check(self, model: nn.Module) -> None:
        """Checks that the mask was made for a model.

        Raises:
            MaskError: if the model has other parameters; it names the first difference.
            ModelError: if the model is in a wrapper (DDP, FSDP) or sharded.
        """
        difference = self.table.difference(ParameterTable.of(model))
        if difference is not None:
            raise MaskError(f"the mask was made for another model: {difference}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the mask to a safetensors file atomically. An existing file is replaced if it is a mask or empty.

        Args:
            path: path of the file.

        Raises:
            RunError: if the file cannot be written, or the path is that of another file, a directory, a device or the
                like.
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


def _all_ids(table: ParameterTable, names: Collection[str]) -> Tensor:
    """Ids of all elements of the named parameters: int64 [k], ascending."""
    return element_ids(table, names, torch.arange(table.size_of(names), dtype=torch.int64, device="cpu"))


__all__ = ["SparseMask"]
