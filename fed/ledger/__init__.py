"""The ledger: its lines, its file, snapshots beside it, and catching up from both."""
