"""Writing a file, or the next part of one, whole or not at all, and keeping it through a power cut."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from .errors import RunError


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that a reader finds the old one or the new one, never a part; it is on disk afterwards.

    Raises:
        RunError: naming the file, if it cannot be written; nothing of it is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def append_fsync(file: BinaryIO, data: bytes) -> None:
    """Writes and fsyncs at the end of an unbuffered file; if that fails, takes back what was written of it.

    Raises:
        OSError: if it fails.
    """
    before = file.seek(0, os.SEEK_END)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # a torn line is what readers expect then
            file.truncate(before)
        raise


def sync_directory(path: Path) -> None:
    """Puts a directory's own list of files on disk, without which a power cut may lose the name of a new one."""
    if os.name == "nt":  # which opens no directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no such request
            raise
    finally:
        os.close(descriptor)


__all__ = ["append_fsync", "sync_directory", "write_atomic"]
