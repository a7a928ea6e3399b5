"""``Snapshot``: the masked weights after a round, so that a run that goes on need not replay all rounds before it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import LedgerError
from ..files import write_whole
from .ledger import Ledger

FORMAT = "meerkat-snapshot/1"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a federation after a round; everything else about it is in the ledger.

    Args:
        round: the last one applied.
        seal: of its line in the ledger.
        masters: float32 [k], the masked weights.
    """

    round: int
    seal: int
    masters: Tensor

    def save(self, path: Path) -> None:
        """Writes it whole or not at all, in place of an older one."""
        metadata = {
            "format": FORMAT,
            "round": str(self.round),
            "seal": f"{self.seal:08x}",
            "masters": _digest(self.masters),
        }
        write_whole(path, save({"masters": self.masters.cpu()}, metadata))

    @classmethod
    def load(cls, path: Path, ledger: Ledger) -> "Snapshot":
        """Reads one that was taken beside a ledger.

        Raises:
            LedgerError: if it cannot be read, is damaged, or was not taken where the ledger says.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata, masters = file.metadata() or {}, file.get_tensor("masters")
            found = cls(round=int(metadata["round"]), seal=int(metadata["seal"], 16), masters=masters)
            wrong = metadata["format"] != FORMAT or metadata["masters"] != _digest(masters)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise LedgerError(f"cannot read the snapshot {path} ({error}); {_ADVICE}") from error
        if wrong or masters.dtype != torch.float32 or masters.shape != (ledger.header.terms.elements,):
            raise LedgerError(f"the snapshot {path} is damaged, or of another format or mask; {_ADVICE}")
        if ledger.seal_of(found.round) != found.seal:
            raise LedgerError(
                f"the snapshot {path} was taken after round {found.round} of a ledger that went another way: either "
                f"this is another run's snapshot, or the ledger has lost rounds; {_ADVICE}"
            )
        return found


_ADVICE = "without the file the run goes on from its ledger alone"


def _digest(masters: Tensor) -> str:
    return hashlib.sha256(masters.cpu().numpy().tobytes()).hexdigest()


__all__ = ["FORMAT", "Snapshot"]
