"""How a client that was away, or never there, catches up with a federation from the files of its server's run."""

from pathlib import Path

from ...engine.errors import LedgerError
from ..replica import Replica
from .file import Ledger, read_ledger
from .snapshot import Snapshot


def catch_up(replica: Replica, ledger: Path, snapshot: Path | None = None) -> bool:
    """Brings a replica to the end of a ledger, by way of the snapshot where that is smaller than what it stands for.

    Args:
        replica: at the beginning of some round; base model and mask are all it needs.
        ledger: file of the run.
        snapshot: file of the run, or None.

    Returns:
        Whether the snapshot was taken. The bits are the same either way.

    Raises:
        LedgerError: if a file is damaged, the ledger is of other terms, or it ends before the replica's round.
    """
    found = read_ledger(ledger)
    if found.header.terms != replica.terms:
        raise LedgerError(f"{ledger} is the ledger of a federation with other terms than this replica's")
    end = len(found.rounds) + 1
    if end < replica.round:
        raise LedgerError(f"{ledger} ends with round {end - 1}; the replica stands at round {replica.round} already")
    taken = snapshot is not None and _load_snapshot(replica, found, snapshot)
    rest = found.rounds[replica.round - 1 :]
    if rest and rest[-1].masters is not None:
        replica.load_masters(rest[-1].round + 1, rest[-1].masters)
    else:
        replica.apply_rounds([line.scalars for line in rest])
    return taken


def _load_snapshot(replica: Replica, ledger: Ledger, path: Path) -> bool:
    """Takes the snapshot over, where it is ahead of the replica and the smaller way."""
    snapshot = Snapshot.load(path, ledger)
    if snapshot.round < replica.round or path.stat().st_size >= ledger.byte_length(replica.round, snapshot.round):
        return False
    replica.load_masters(snapshot.round + 1, snapshot.masters.numpy())
    return True


__all__ = ["catch_up"]
