"""Catching up with a federation from the server's files, for a client that missed rounds or joins late."""

from pathlib import Path

from ...engine.errors import LedgerError
from ...engine.parameters import fingerprint
from ..replica import Replica
from .file import Ledger, read_ledger
from .snapshot import Snapshot


def catch_up(replica: Replica, ledger: Path, snapshot: Path | None = None) -> bool:
    """Brings a replica to the end of a ledger.

    It applies the snapshot first if that is smaller than the ledger lines that it replaces.

    Args:
        replica: the replica, at the beginning of any round of the ledger, with base model and mask of the run.
        ledger: path of the run's ledger.
        snapshot: path of the run's snapshot, or None.

    Returns:
        Whether the snapshot was used. The resulting weights have the same bits either way.

    Raises:
        LedgerError: if a file is damaged, the ledger has other terms than the replica, the replica is at round 1 with
            another base model, or the ledger ends before the replica's round.
    """
    content = read_ledger(ledger)
    if content.header.terms != replica.terms:
        raise LedgerError(f"the ledger {ledger} belongs to a federation with other terms than this replica's")
    if replica.round == 1 and (base := fingerprint(replica.model)) != content.header.base:
        raise LedgerError(
            f"the ledger {ledger} starts from a base model with fingerprint {content.header.base[:12]}, this replica's "
            f"has {base[:12]}"
        )
    end = len(content.rounds) + 1
    if end < replica.round:
        raise LedgerError(
            f"the ledger {ledger} ends with round {end - 1}, the replica is already at round {replica.round}"
        )
    used_snapshot = snapshot is not None and _load_snapshot(replica, content, snapshot)
    rest = content.rounds[replica.round - 1 :]
    if rest and rest[-1].masters is not None:
        replica.load_masters(rest[-1].round + 1, rest[-1].masters)
    else:
        replica.apply_rounds([line.scalars for line in rest])
    return used_snapshot


def _load_snapshot(replica: Replica, ledger: Ledger, path: Path) -> bool:
    """Loads the snapshot if it is ahead of the replica and smaller than the ledger lines; returns whether it did."""
    snapshot = Snapshot.load(path, ledger)
    if snapshot.round < replica.round or path.stat().st_size >= ledger.byte_length(replica.round, snapshot.round):
        return False
    replica.load_masters(snapshot.round + 1, snapshot.masters.numpy())
    return True


__all__ = ["catch_up"]
