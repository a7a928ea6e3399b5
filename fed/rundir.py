"""A run directory: config.toml, mask.safetensors, ledger.jsonl, metrics.jsonl, and gradip.jsonl with GradIP."""

import json
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import write_whole
from ..mask import SparseMask
from .config import RunConfig
from .gradip import Trace
from .ledger import Header, LedgerWriter

CONFIG, MASK, LEDGER, METRICS = "config.toml", "mask.safetensors", "ledger.jsonl", "metrics.jsonl"
GRADIP = "gradip.jsonl"


class RunDirectory:
    """A new run directory, made when the run has all it needs.

    Args:
        path: does not exist yet, or is empty.

    Raises:
        RunError: if it holds anything already, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        check_free(path)
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the output directory {path}: {error}") from error

    def begin(self, config: RunConfig, mask: SparseMask, header: Header) -> LedgerWriter:
        """Writes what the run starts from and opens its ledger."""
        write_whole(self.path / CONFIG, config.to_toml().encode())
        mask.save(self.path / MASK)
        (self.path / METRICS).touch(exist_ok=False)
        return LedgerWriter(self.path / LEDGER, header)

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Appends one object to the metrics; raises ``RunError`` if it cannot."""
        self._append(METRICS, line)

    def add_traces(self, round: int, traces: dict[int, Trace]) -> None:
        """Appends what the server saw of the clients' paths, to six digits; raises ``RunError`` if it cannot."""
        clients = {
            str(i): {name: [float(f"{x:.6g}") for x in values] for name, values in vars(trace).items()}
            for i, trace in traces.items()
        }
        self._append(GRADIP, {"round": round, "clients": clients})

    def _append(self, name: str, line: dict[str, Any]) -> None:
        path = self.path / name
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}; the rounds in {LEDGER} are complete") from error


def check_free(path: Path) -> None:
    """Raises ``RunError`` if the path is taken; nothing is ever overwritten."""
    if path.is_dir() and any(path.iterdir()):
        what = "a run" if (path / LEDGER).exists() else "files"
        raise RunError(f"the output directory {path} already holds {what}; choose another, nothing was changed")
    if path.exists() and not path.is_dir():
        raise RunError(f"the output directory {path} is a file; choose another, nothing was changed")


__all__ = ["CONFIG", "GRADIP", "LEDGER", "MASK", "METRICS", "RunDirectory", "check_free"]
