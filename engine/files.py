"""Writing a file, or the next part of one, whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that a reader finds the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def append_whole(file: BinaryIO, data: bytes) -> None:
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
    """Puts a directory's entries on disk: a new or renamed file is there after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["append_whole", "sync_directory", "write_whole"]
