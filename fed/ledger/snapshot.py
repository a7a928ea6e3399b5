"""``Snapshot``: the masked weights after a round, from which a run resumes without replaying all rounds before it."""

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
    remedy="delete the file, and the run resumes from its ledger alone",
)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The masked weights after a round. All other state of the federation is in the ledger.

    Args:
        round: the last round applied to the weights.
        crc: CRC-32 of that round's line in the ledger.
        mask: digest of the mask.
        masters: float32 [k], the masked weights.
    """

    round: int
    crc: int
    mask: str
    masters: Tensor

    def save(self, path: Path) -> None:
        """Writes the snapshot atomically; replaces an existing file."""
        metadata = {"round": str(self.round), "seal": f"{self.crc:08x}", "mask": self.mask}
        write_checksummed(path, _KIND, {"masters": self.masters.cpu()}, metadata)

    @classmethod
    def load(cls, path: Path, ledger: Ledger) -> "Snapshot":
        """Reads a snapshot.

        Args:
            path: path of the file.
            ledger: the ledger of the same run.

        Raises:
            LedgerError: if the file cannot be read, is damaged, or does not belong to a round of this ledger.
        """
        metadata, tensors = read_checksummed(path, _KIND)
        try:
            snapshot = cls(
                round=int(metadata["round"]), crc=int(metadata["seal"], 16), mask=metadata["mask"], **tensors
            )
        except ValueError as error:
            raise LedgerError(f"the snapshot {path} is damaged: {error}; {_KIND.remedy}") from error
        terms = ledger.header.terms
        if snapshot.mask != terms.mask_digest or snapshot.masters.shape != (terms.elements,):
            raise LedgerError(f"the snapshot {path} was made with another mask than the ledger; {_KIND.remedy}")
        if ledger.crc_of(snapshot.round) != snapshot.crc:
            raise LedgerError(
                f"the snapshot {path} is of round {snapshot.round}, whose line in the ledger is another or missing: "
                f"either this is another run's snapshot, or the ledger has lost rounds; {_KIND.remedy}"
            )
        return snapshot


__all__ = ["Snapshot"]
