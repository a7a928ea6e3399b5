"""``Delta``: the masked weights of a fine-tuned model, to be applied to its base model.

File: safetensors with ``ids`` int64 [k] and ``masters`` float32 [k]. Everything else is metadata. A checksum covers
tensors and metadata (see ``docs/formats.md``).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checksummed import FileKind, read_checksummed, write_checksummed
from .errors import DeltaError, MaskError
from .mask import SparseMask
from .parameters import ParameterTable, fingerprint, fingerprint_by_kind, floating_parameters
from .weights import MaskedWeights

_KIND = FileKind(
    name="delta",
    format="meerkat-delta/3",
    keys=frozenset(
        {"base", "base_by_kind", "dtype", "kept", "mask", "method", "round", "table", "table_digest", "weights"}
    ),
    tensors={"ids": "I64", "masters": "F32"},
    error=DeltaError,
    remedy="create it again with `meerkat-engine replay RUN --delta FILE`",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """Masters of the masked elements, and the fingerprints of the model before and after applying them.

    Build a delta with ``of``, or ``load`` one.

    Args:
        mask: mask with the elements that the delta sets.
        masters: finite masters of these elements, float32 [k] on the CPU, in mask order.
        base: fingerprint of the base model.
        base_by_kind: ``parameters.fingerprint_by_kind`` of the base model.
        weights: fingerprint of the model after applying the delta.
        dtype: dtype of the base model's parameters, as in ``models.DTYPES``; "mixed" if they have several.
        kept: how the base model's weights are kept, for whoever loads it: a name of ``quantize.Quantize``, with "+add"
            if masked weights are added to outputs, "+round" if they are rounded. The fingerprints are those of the
            dense weights that it computes with.
        method: name of the method that made the masters; may be empty.
        round: last round of the run that made the masters, at least 0; 0 without a run.
        where: name of the delta in error messages.

    Raises:
        DeltaError: if the masters are not float32 [k] or not finite, or the round is negative.
    """

    mask: SparseMask
    masters: Tensor
    base: str
    base_by_kind: Mapping[str, str]
    weights: str
    dtype: str
    kept: str = "none"
    method: str = ""
    round: int = 0
    where: str = "the delta"

    def __post_init__(self) -> None:
        if self.masters.shape != self.mask.ids.shape or self.masters.dtype != torch.float32:
            raise DeltaError(
                f"masters must be float32 [{len(self.mask)}], got {self.masters.dtype} {list(self.masters.shape)}"
            )
        not_finite = torch.nonzero(~self.masters.isfinite())
        if not_finite.numel():
            position = int(not_finite[0])
            raise DeltaError(f"masters must be finite; position {position} holds {self.masters[position].item()}")
        if self.round < 0:
            raise DeltaError(f"the round must be 0 or more, got {self.round}")

    @classmethod
    def of(
        cls,
        model: nn.Module,
        weights: MaskedWeights,
        *,
        base: str,
        start: Tensor,
        kept: str = "none",
        method: str = "",
        round: int = 0,
    ) -> "Delta":
        """Makes the delta from the base model to the model's present weights.

        Args:
            model: the fine-tuned model. Its masked weights are set to those of the base model for a moment.
            weights: the model's masked weights, in the restored state (true at any time except within a step).
            base: ``parameters.fingerprint`` of the base model.
            start: ``weights.masters()`` of the base model, float32 [k], taken before anything was trained.
            kept: how the base model's weights are kept, stored in the delta.
            method: name of the method that changed the weights, stored in the delta.
            round: last round of the run, stored in the delta.

        Raises:
            DeltaError: if the model differs from the base model in more than its masked weights, or a masked weight is
                not its rounded master: a delta would lose the difference.
        """
        after, masters = fingerprint(model), weights.masters()
        try:
            weights.set_masters_(start)
            before, base_by_kind = fingerprint(model), fingerprint_by_kind(model)
        finally:
            weights.set_masters_(masters)
        if before != base:
            raise DeltaError(
                f"the model is not its base model {base[:12]} with other masked weights, but {before[:12]}: a delta "
                f"would lose what else was changed; leave everything else as it is (batch normalization moves buffers "
                f"in training mode), or save the whole model"
            )
        if fingerprint(model) != after:
            raise DeltaError("masked weights were changed without the optimizer, which has now set them back")
        dtypes = {str(p.dtype).removeprefix("torch.") for _, p in floating_parameters(model)}
        return cls(
            mask=weights.mask,
            masters=masters.cpu(),
            base=base,
            base_by_kind=base_by_kind,
            weights=after,
            dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
            kept=kept,
            method=method,
            round=round,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the delta to a safetensors file atomically. An existing file is replaced if it is a delta or empty.

        Args:
            path: path of the file.

        Raises:
            RunError: if the file cannot be written, or the path is that of another file, a directory, a device or the
                like.
        """
        metadata = {
            "base": self.base,
            "base_by_kind": json.dumps(dict(self.base_by_kind)),
            "dtype": self.dtype,
            "kept": self.kept,
            "method": self.method,
            "round": str(self.round),
            "table": self.mask.table.to_json(),
            "weights": self.weights,
        }
        write_checksummed(path, _KIND, {"ids": self.mask.ids, "masters": self.masters}, metadata | _derived(self.mask))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Delta":
        """Reads a delta file.

        Args:
            path: path of the file.

        Raises:
            DeltaError: if the file is missing, damaged or of another format; it names the file.
        """
        metadata, tensors = read_checksummed(path, _KIND)
        where, ids = f"the delta {os.fspath(path)!r}", tensors["ids"]
        try:
            table = ParameterTable.from_json(metadata["table"])
            mask = SparseMask(ids=ids, table=table, density=ids.numel() / max(1, table.size), source="delta")
            plain = {key: metadata[key] for key in ("base", "weights", "dtype", "kept", "method")}
            delta = cls(
                mask=mask,
                masters=tensors["masters"],
                round=int(metadata["round"]),
                where=where,
                base_by_kind=dict(json.loads(metadata["base_by_kind"])),
                **plain,
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise DeltaError(f"{where} is damaged: {error}") from error
        for key, value in _derived(mask).items():
            if metadata[key] != value:
                raise DeltaError(f"{where} is damaged: its {key} does not match its ids and table")
        return delta

    def apply_to_other(self, model: nn.Module, backend: str = "auto") -> None:
        """Sets the masked weights in another model of the same parameters, such as the base with unquantized weights.

        The result is another model than the fine-tuned one: its other weights differ.

        Args:
            model: the model; its masked weights are written.
            backend: see ``apply``.

        Raises:
            DeltaError: if the model has other parameters.
            ValueError: see ``apply``.
        """
        difference = self.mask.table.difference(ParameterTable.of(model))
        if difference is not None:
            raise DeltaError(f"{self.where} was made for another model: {difference}")
        MaskedWeights(model, self.mask, backend).set_masters_(self.masters)

    def apply(self, model: nn.Module, backend: str = "auto") -> None:
        """Applies the masked weights to a base model, which then has the bits of the fine-tuned model.

        Args:
            model: the base model in its original dtype; its masked weights are written.
            backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.

        Raises:
            DeltaError: if the model is not the delta's base model, or the result has another fingerprint than the
                delta states. The message contains the difference. The model is unchanged.
            ValueError: if a masked parameter is not contiguous.
        """
        difference = self.mask.table.difference(ParameterTable.of(model))
        if difference is not None:
            raise DeltaError(f"{self.where} was made for another model: {difference}")
        base = fingerprint(model)
        if base != self.base:
            by_kind = fingerprint_by_kind(model).items()
            differing = [kind for kind, digest in by_kind if digest != self.base_by_kind.get(kind)]
            kept = "" if self.kept == "none" else f" whose weights are kept as {self.kept}"
            raise DeltaError(
                f"{self.where} needs a base model of dtype {self.dtype}{kept} with fingerprint {self.base[:12]}; "
                f"this model has fingerprint {base[:12]} (other {' and '.join(differing)})"
            )
        try:
            weights = MaskedWeights(model, self.mask, backend)
        except MaskError as error:  # two parameters share memory
            raise DeltaError(f"{self.where} cannot be applied: {error}") from error
        before = weights.masters()
        weights.set_masters_(self.masters)
        after = fingerprint(model)
        if after != self.weights:
            weights.set_masters_(before)
            raise DeltaError(
                f"{self.where} should give weights with fingerprint {self.weights[:12]}, but gives {after[:12]}; "
                f"nothing was changed"
            )


def _derived(mask: SparseMask) -> dict[str, str]:
    """Metadata derived from ids and table."""
    return {"mask": mask.digest, "table_digest": mask.table.digest}


__all__ = ["Delta"]
