"""Atomic writes and appends to files that survive a power cut."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from .errors import RunError


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file atomically: readers see the old content or the new content, never a part. Syncs it to disk.

    Args:
        path: path of the file; its directory must exist.
        data: the complete content.

    Raises:
        RunError: if the file cannot be written. No partial file is left.
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
    """Appends to an unbuffered file and syncs it to disk. If this fails, removes the part that was written.

    Args:
        file: file open for writing, unbuffered.
        data: bytes to append.

    Raises:
        OSError: if writing or syncing fails.
    """
    size_before = file.seek(0, os.SEEK_END)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # if this fails too, a torn last line remains, which readers drop
            file.truncate(size_before)
        raise


def sync_directory(path: Path) -> None:
    """Syncs a directory's list of files to disk. Without this a power cut may lose the name of a new file."""
    if os.name == "nt":  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not support it
            raise
    finally:
        os.close(descriptor)


__all__ = ["append_fsync", "sync_directory", "write_atomic"]
