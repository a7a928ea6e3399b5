"""``Delta``: a fine-tuned model as its masked weights alone, to be put onto the base model it came from.

File: safetensors with ``ids`` int64 [k] and ``masters`` float32 [k]; everything else is metadata, and a checksum covers
it all (see ``docs/formats.md``).
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checksummed import FileKind, read_checksummed, write_checksummed
from .errors import DeltaError, MaskError
from .mask import SparseMask
from .parameters import ParameterTable, fingerprint, floating_parameters
from .weights import MaskedWeights

_KIND = FileKind(
    name="delta",
    format="meerkat-delta/1",
    keys=frozenset({"base", "dtype", "mask", "method", "round", "table", "table_digest", "weights"}),
    tensors={"ids": "I64", "masters": "F32"},
    error=DeltaError,
    remedy="make it anew with `meerkat-engine replay RUN --delta FILE`",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """Masters of the masked elements, and between which two sets of weights they lead.

    Build one with ``of``, or ``load`` it.

    Args:
        mask: the elements.
        masters: float32 [k] on the CPU, in mask order; finite.
        base: fingerprint of the model it goes onto.
        weights: fingerprint of that model afterwards.
        dtype: of the base model's parameters, as in ``models.DTYPES``; "mixed" where they have several.
        method: how the masters came about, in words; may be empty.
        round: of the run, at whose end they stood; 0 where there was none.
        where: what messages call it.

    Raises:
        DeltaError: if the masters are not float32 [k] or not finite, or the round is negative.
    """

    mask: SparseMask
    masters: Tensor
    base: str
    weights: str
    dtype: str
    method: str = ""
    round: int = 0
    where: str = "the delta"

    def __post_init__(self) -> None:
        if self.masters.shape != self.mask.ids.shape or self.masters.dtype != torch.float32:
            raise DeltaError(
                f"masters must be float32 [{len(self.mask)}], got {self.masters.dtype} {list(self.masters.shape)}"
            )
        wrong = torch.nonzero(~self.masters.isfinite())
        if wrong.numel():
            raise DeltaError(f"masters must be finite; position {int(wrong[0])} holds {self.masters[wrong[0]].item()}")
        if self.round < 0:
            raise DeltaError(f"the round must be 0 or more, got {self.round}")

    @classmethod
    def of(cls, model: nn.Module, weights: MaskedWeights, *, base: str, method: str = "", round: int = 0) -> "Delta":
        """What tells a model from its base.

        Args:
            model: as it stands.
            weights: its masked weights, restored (as they are but within a step).
            base: ``parameters.fingerprint`` of the model before they were changed.
            method: how they were changed, kept with the delta.
            round: of the run, kept with the delta.
        """
        dtypes = {str(p.dtype).removeprefix("torch.") for _, p in floating_parameters(model)}
        return cls(
            mask=weights.mask,
            masters=weights.masters().cpu(),
            base=base,
            weights=fingerprint(model),
            dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
            method=method,
            round=round,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the delta to a safetensors file, whole or not at all; raises ``RunError`` if it cannot."""
        metadata = {
            "base": self.base,
            "dtype": self.dtype,
            "method": self.method,
            "round": str(self.round),
            "table": self.mask.table.to_json(),
            "weights": self.weights,
        }
        write_checksummed(path, _KIND, {"ids": self.mask.ids, "masters": self.masters}, metadata | _derived(self.mask))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Delta":
        """Reads a delta.

        Raises:
            DeltaError: naming the file, if it is missing, damaged or of another format.
        """
        metadata, tensors = read_checksummed(path, _KIND)
        where, ids = f"the delta {os.fspath(path)!r}", tensors["ids"]
        try:
            table = ParameterTable.from_json(metadata["table"])
            mask = SparseMask(ids=ids, table=table, density=ids.numel() / max(1, table.size), source="delta")
            plain = {key: metadata[key] for key in ("base", "weights", "dtype", "method")}
            delta = cls(mask=mask, masters=tensors["masters"], round=int(metadata["round"]), where=where, **plain)
        except ValueError as error:
            raise DeltaError(f"{where} is damaged: {error}") from error
        for key, value in _derived(mask).items():
            if metadata[key] != value:
                raise DeltaError(f"{where} is damaged: its {key} is not that of its ids and table")
        return delta

    def apply(self, model: nn.Module, backend: str = "auto") -> None:
        """Puts the masked weights onto a base model; it has the bits of the model that the delta was taken of.

        Args:
            model: the base, in the dtype it had there; its masked weights are written.
            backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.

        Raises:
            DeltaError: saying what differs, if the model is another one, or does not end with the weights it should;
                it is left as it was.
            ValueError: if a masked parameter is not contiguous.
        """
        difference = self.mask.table.difference(ParameterTable.of(model))
        if difference is not None:
            raise DeltaError(f"{self.where} was made for another model: {difference}")
        base = fingerprint(model)
        if base != self.base:
            raise DeltaError(
                f"{self.where} goes onto a base model of dtype {self.dtype} with fingerprint {self.base[:12]}; "
                f"this one has {base[:12]}"
            )
        try:
            weights = MaskedWeights(model, self.mask, backend)
        except MaskError as error:  # memory shared by two parameters
            raise DeltaError(f"{self.where} cannot be applied: {error}") from error
        before = weights.masters()
        weights.set_masters_(self.masters)
        found = fingerprint(model)
        if found != self.weights:
            weights.set_masters_(before)
            raise DeltaError(
                f"{self.where} should lead to weights with fingerprint {self.weights[:12]}, and leads to {found[:12]}; "
                f"nothing was changed"
            )


def _derived(mask: SparseMask) -> dict[str, str]:
    """Metadata that follows from ids and table."""
    return {"mask": mask.digest, "table_digest": mask.table.digest}


__all__ = ["Delta"]
