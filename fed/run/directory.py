"""A run directory: what a run starts from, what it wrote, and the lock of the process that writes."""

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import transformers
from filelock import FileLock, Timeout

from ... import __version__
from ...engine.atomic_files import append_fsync, sync_directory, write_atomic
from ...engine.errors import RunError
from ...engine.mask import SparseMask
from ..config.run_config import RunConfig
from ..config.toml import config_toml
from ..gradip import Trace
from ..ledger.file import LedgerHeader, LedgerWriter
from .jsonl import Line

CONFIG, MASK, ORIGIN = "config.toml", "mask.safetensors", "origin.json"
LEDGER, METRICS, GRADIP, SNAPSHOT = "ledger.jsonl", "metrics.jsonl", "gradip.jsonl", "snapshot.safetensors"
_LOCK = ".lock"
_PARTIAL = re.compile(rf"\.({'|'.join(map(re.escape, (CONFIG, MASK, ORIGIN, SNAPSHOT)))})\.\d+\.partial")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a run began: what its bits depend on beside its settings.

    Args:
        data: digest of the examples and of who has which.
        settings: digest of those that the bits depend on.
        version: of this package.
        python: version.
        torch: version.
        transformers: version.
        threads: of torch.
        deterministic: whether torch was asked for deterministic algorithms, which the same bits need on a GPU.
        device: by name.
    """

    data: str
    settings: str
    version: str
    python: str
    torch: str
    transformers: str
    threads: int
    deterministic: bool
    device: str

    @classmethod
    def here(cls, *, data: str, settings: str, device: str) -> "Origin":
        """This process."""
        return cls(
            data=data,
            settings=settings,
            version=__version__,
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        )

    def differences(self, other: "Origin") -> list[str]:
        """What is different here from there, data and settings aside: in words."""
        there = {name: value for name, value in vars(other).items() if name not in ("data", "settings")}
        return [
            f"{name} {value}, now {getattr(self, name)}"
            for name, value in there.items()
            if value != getattr(self, name)
        ]


class RunDirectory:
    """A run directory and its lock: one process writes. A context manager, which gives the lock back.

    Args:
        path: of the directory; made if need be.

    Raises:
        RunError: if it cannot be made or written, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / _LOCK, timeout=0)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise RunError(f"another process is writing to {path}; nothing was changed") from error
        except OSError as error:
            raise RunError(f"cannot write to the run directory {path}: {error.strerror}") from error
        for each in path.iterdir():
            if _PARTIAL.fullmatch(each.name):  # of a process that was killed while it wrote
                each.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def begin(self, config: RunConfig) -> None:
        """Writes the settings down: from now on there is a run here, which can be resumed."""
        check_unused(self.path)
        write_atomic(self.path / CONFIG, config_toml(config).encode())

    def keep(self, mask: SparseMask, origin: Origin) -> None:
        """Writes down what is not there yet of what the run begins with."""
        if not (self.path / MASK).exists():
            mask.save(self.path / MASK)
        if not (self.path / ORIGIN).exists():
            write_atomic(self.path / ORIGIN, (json.dumps(vars(origin), indent=1) + "\n").encode())

    def new_ledger(self, header: LedgerHeader) -> LedgerWriter:
        """Begins the ledger, after one that was killed before its header was whole."""
        path = self.path / LEDGER
        path.unlink(missing_ok=True)
        return LedgerWriter(path, header)

    def has_ledger(self) -> bool:
        """Whether the ledger has its header."""
        path = self.path / LEDGER
        if not path.exists():
            return False
        with open(path, "rb") as file:
            return file.readline().endswith(b"\n")

    def cut(self, name: str, lines: int) -> None:
        """Leaves only so many lines in a JSON Lines file."""
        path = self.path / name
        if not path.exists():
            return
        size = sum(len(text) + 1 for text in path.read_bytes().split(b"\n")[:lines])
        if size < path.stat().st_size:
            os.truncate(path, size)

    def add_metrics(self, line: Line) -> None:
        """Appends one object to the metrics; raises ``RunError`` if it cannot."""
        self._append(METRICS, line)

    def add_traces(self, round: int, traces: Mapping[int, Trace]) -> None:
        """Appends what the server saw of the clients' paths, to six digits; raises ``RunError`` if it cannot."""
        clients = {
            str(i): {name: [float(f"{x:.6g}") for x in values] for name, values in vars(trace).items()}
            for i, trace in traces.items()
        }
        self._append(GRADIP, {"round": round, "clients": clients})

    def _append(self, name: str, line: Line) -> None:
        path = self.path / name
        new = not path.exists()
        try:
            with open(path, "ab", buffering=0) as file:
                append_fsync(file, (json.dumps(line, allow_nan=False) + "\n").encode())
            if new:
                sync_directory(self.path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}; the rounds in {LEDGER} are complete") from error


def read_origin(path: Path) -> Origin | None:
    """Where the run in a directory began, if that has been written down; raises ``RunError`` if it cannot be read."""
    file = path / ORIGIN
    if not file.exists():
        return None
    try:
        return Origin(**json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise RunError(f"{file} is damaged ({error}); nothing was changed") from error


def is_run(path: Path) -> bool:
    """Whether a run has begun there."""
    return (path / CONFIG).is_file()


def check_unused(path: Path) -> None:
    """Raises ``RunError`` if the path is taken; nothing is ever overwritten."""
    if path.is_dir():
        found = [each for each in path.iterdir() if each.name != _LOCK and not _PARTIAL.fullmatch(each.name)]
        if found:
            what = "a run" if is_run(path) else "files"
            also = f", or go on with it by --resume {path}" if what == "a run" else ""
            raise RunError(f"the output directory {path} already holds {what}; choose another{also}; "
                           f"nothing was changed")  # fmt: skip
    elif path.exists():
        raise RunError(f"the output directory {path} is a file; choose another, nothing was changed")


__all__ = [
    "CONFIG",
    "GRADIP",
    "LEDGER",
    "MASK",
    "METRICS",
    "ORIGIN",
    "SNAPSHOT",
    "Origin",
    "RunDirectory",
    "check_unused",
    "is_run",
    "read_origin",
]
