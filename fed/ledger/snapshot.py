"""``Snapshot``: the masked weights after a round, so that a run that goes on need not replay all rounds before it."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...engine.checksummed import FileKind, read_checksummed, write_checksummed
from ...engine.errors import LedgerError
from .file import Ledger

_KIND = FileKind(
    name="snapshot",
    format="meerkat-snapshot/1",
    keys=frozenset({"round", "seal", "mask"}),
    tensors={"masters": "F32"},
    error=LedgerError,
    remedy="without the file the run goes on from its ledger alone",
)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a federation after a round; everything else about it is in the ledger.

    Args:
        round: the last one applied.
        seal: of its line in the ledger.
        mask: digest of the mask.
        masters: float32 [k], the masked weights.
    """

    round: int
    seal: int
    mask: str
    masters: Tensor

    def save(self, path: Path) -> None:
        """Writes it whole or not at all, in place of an older one."""
        metadata = {"round": str(self.round), "seal": f"{self.seal:08x}", "mask": self.mask}
        write_checksummed(path, _KIND, {"masters": self.masters.cpu()}, metadata)

    @classmethod
    def load(cls, path: Path, ledger: Ledger) -> "Snapshot":
        """Reads one that was taken beside a ledger.

        Raises:
            LedgerError: if it cannot be read, is damaged, or was not taken where the ledger says.
        """
        metadata, tensors = read_checksummed(path, _KIND)
        try:
            found = cls(round=int(metadata["round"]), seal=int(metadata["seal"], 16), mask=metadata["mask"], **tensors)
        except ValueError as error:
            raise LedgerError(f"the snapshot {path} is damaged: {error}; {_KIND.remedy}") from error
        terms = ledger.header.terms
        if found.mask != terms.mask_digest or found.masters.shape != (terms.elements,):
            raise LedgerError(f"the snapshot {path} is of another mask than the ledger; {_KIND.remedy}")
        if ledger.seal_of(found.round) != found.seal:
            raise LedgerError(
                f"the snapshot {path} was taken after round {found.round} of a ledger that went another way: either "
                f"this is another run's snapshot, or the ledger has lost rounds; {_KIND.remedy}"
            )
        return found


__all__ = ["Snapshot"]
