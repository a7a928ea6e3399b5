"""The ledger: its lines, its file, snapshots, and catching up from both files."""
