"""A run directory: its files, and the lock that lets one process write them."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from filelock import FileLock, Timeout

from ... import __version__
from ...engine.atomic_files import append_fsync, sync_directory, write_atomic
from ...engine.errors import RunError
from ...engine.mask import SparseMask
from ..config.run_config import RunConfig
from ..config.toml import config_toml
from ..ledger.file import LedgerHeader, LedgerWriter
from .jsonl import Line

CONFIG, MASK, ORIGIN = "config.toml", "mask.safetensors", "origin.json"
LEDGER, METRICS, GRADIP, SNAPSHOT = "ledger.jsonl", "metrics.jsonl", "gradip.jsonl", "snapshot.safetensors"
ORIGIN_REMEDY = (
    "put a copy back, or start a new run: without it nothing tells whether the examples and settings are still the same"
)
_LOCK = ".lock"
_PARTIAL = re.compile(rf"\.({'|'.join(map(re.escape, (CONFIG, MASK, ORIGIN, SNAPSHOT)))})\.\d+\.partial")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Inputs and software that a run started with, on which its bits depend. Stored in ``origin.json``.

    Args:
        data: digest of the examples and of their partition.
        settings: digest of the settings that the bits depend on.
        version: version of this package.
        python: version of Python.
        torch: version of torch.
        transformers: version of transformers.
        threads: number of torch's threads.
        deterministic: whether torch uses deterministic algorithms; without them, bits on a GPU may differ.
        device: name of the device.
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
    def of_this_process(cls, *, data: str, settings: str, device: str) -> "Origin":
        """The origin of a run that starts in this process.

        Args:
            data: see ``Origin``.
            settings: see ``Origin``.
            device: value of the setting ``device``: "cpu" or "cuda".
        """
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

    def differences(self, earlier: "Origin") -> list[str]:
        """Describes what differs from an earlier origin, except data and settings, one line a difference."""
        return [
            f"{name} {earlier_value}, now {getattr(self, name)}"
            for name, earlier_value in vars(earlier).items()
            if name not in ("data", "settings") and earlier_value != getattr(self, name)
        ]


class RunDirectory:
    """A run directory, locked so that only one process writes. A context manager, which releases the lock.

    Args:
        path: path of the directory, which is created if it does not exist.

    Raises:
        RunError: if the directory cannot be created or written, or another process holds the lock.
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
        for file in path.iterdir():
            if _PARTIAL.fullmatch(file.name):  # left by a process that was killed while it wrote
                file.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def write_config(self, config: RunConfig) -> None:
        """Writes ``config.toml``. From then on the directory holds a run, which can be resumed.

        Raises:
            RunError: if the directory is not empty.
        """
        check_unused(self.path)
        write_atomic(self.path / CONFIG, config_toml(config).encode())

    def write_mask_and_origin(self, mask: SparseMask, origin: Origin) -> None:
        """Writes the mask file and ``origin.json``, unless they exist."""
        self.write_mask(mask)
        if not (self.path / ORIGIN).exists():
            fields = {**vars(origin), "checksum": _checksum(vars(origin))}
            write_atomic(self.path / ORIGIN, (json.dumps(fields, indent=1) + "\n").encode())

    def write_mask(self, mask: SparseMask) -> None:
        """Writes the mask file, unless it exists."""
        if not (self.path / MASK).exists():
            mask.save(self.path / MASK)

    def create_ledger(self, header: LedgerHeader) -> LedgerWriter:
        """Creates the ledger. Replaces one whose header is incomplete because the process was killed."""
        path = self.path / LEDGER
        path.unlink(missing_ok=True)
        return LedgerWriter(path, header)

    def has_ledger(self) -> bool:
        """Whether there is a ledger with a complete header."""
        path = self.path / LEDGER
        if not path.exists():
            return False
        with open(path, "rb") as file:
            return file.readline().endswith(b"\n")

    def truncate_lines(self, name: str, lines: int) -> None:
        """Truncates a JSON Lines file after its first ``lines`` lines. Does nothing if there is no file."""
        path = self.path / name
        if not path.exists():
            return
        size = sum(len(text) + 1 for text in path.read_bytes().split(b"\n")[:lines])
        if size < path.stat().st_size:
            os.truncate(path, size)

    def add_metrics(self, line: Line) -> None:
        """Appends a line to ``metrics.jsonl``; raises ``RunError`` if it cannot be written."""
        self.append(METRICS, (json.dumps(line, allow_nan=False) + "\n").encode())

    def append(self, name: str, line: bytes) -> None:
        """Appends a line to a file and fsyncs it; raises ``RunError`` if it cannot be written."""
        path = self.path / name
        new = not path.exists()
        try:
            with open(path, "ab", buffering=0) as file:
                append_fsync(file, line)
            if new:
                sync_directory(self.path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}; the rounds in {LEDGER} are complete") from error


def read_origin(path: Path) -> Origin | None:
    """Reads ``origin.json`` in a run directory.

    Returns:
        The origin; None if there is no file.

    Raises:
        RunError: if the file is damaged.
    """
    file = path / ORIGIN
    if not file.exists():
        return None
    try:
        fields = json.loads(file.read_bytes())
        if fields.pop("checksum") != _checksum(fields):
            raise ValueError("its checksum does not match")
        return Origin(**fields)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise RunError(f"{file} is damaged ({error}); {ORIGIN_REMEDY}; nothing was changed") from error


def _checksum(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the fields of ``origin.json`` without the checksum, as JSON without spaces, in hexadecimal."""
    return hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest()


def is_run(path: Path) -> bool:
    """Whether a directory holds a run, finished or not."""
    return (path / CONFIG).is_file()


def check_unused(path: Path) -> None:
    """Raises ``RunError`` if a path cannot become a new run directory, because something is in its place."""
    if path.is_dir():
        if any(file.name != _LOCK and not _PARTIAL.fullmatch(file.name) for file in path.iterdir()):
            if is_run(path):
                raise RunError(
                    f"the output directory {path} already holds a run; choose another directory, or resume that run "
                    f"with --resume {path}; nothing was changed"
                )
            raise RunError(
                f"the output directory {path} already holds files; choose another directory; nothing was changed"
            )
    elif path.exists():
        raise RunError(f"the output directory {path} is a file; choose another path; nothing was changed")


__all__ = [
    "CONFIG",
    "GRADIP",
    "LEDGER",
    "MASK",
    "METRICS",
    "ORIGIN",
    "ORIGIN_REMEDY",
    "SNAPSHOT",
    "Origin",
    "RunDirectory",
    "check_unused",
    "is_run",
    "read_origin",
]
