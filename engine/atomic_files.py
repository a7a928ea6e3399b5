"""Atomic writes and appends to files that survive a power cut."""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from .errors import RunError


def write_atomic(path: Path, data: bytes, *, replaces: Callable[[Path], bool] | None = None) -> None:
    """Writes a file atomically: readers see the old content or the new content, never a part. Syncs it to disk.

    Only regular files are written. A symbolic link is followed and stays. A replaced file keeps its mode, and its owner
    where the system allows that.

    Args:
        path: path of the file; its directory must exist.
        data: the complete content.
        replaces: tells whether the existing file at a path may be replaced, usually because it is of the same kind.
            None replaces none. An empty file may always be replaced.

    Raises:
        RunError: if the file cannot be written; if a directory, a device or the like, a read-only file, or a file that
            may not be replaced is there. No partial file is left.
    """
    try:
        existing = _check_existing(path, replaces)
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if existing is not None:
                _copy_owner_and_mode(existing, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(target.parent)
    except RunError:
        raise
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def _check_existing(path: Path, replaces: Callable[[Path], bool] | None) -> os.stat_result | None:
    """Returns the status of the file at a path, None without one; raises ``RunError`` if it may not be replaced."""
    try:
        existing = os.stat(path)
    except FileNotFoundError:  # also a link to a file that does not exist yet
        return None
    if not stat.S_ISREG(existing.st_mode):
        kind = "a directory" if stat.S_ISDIR(existing.st_mode) else "a device, pipe or socket"
        raise RunError(f"cannot write {path}: it is {kind}, and only regular files are written; choose another path")
    if not existing.st_mode & 0o222 or not os.access(path, os.W_OK):  # root may write everything
        raise RunError(f"cannot write {path}: the file there is read-only; choose another path, or make it writable")
    if existing.st_size and (replaces is None or not replaces(path)):
        raise RunError(f"cannot write {path}: another file is there, which is not replaced; choose another path")
    return existing


def _copy_owner_and_mode(source: os.stat_result, path: Path) -> None:
    if hasattr(os, "chown"):  # not on Windows
        with suppress(PermissionError):
            os.chown(path, source.st_uid, source.st_gid)
    os.chmod(path, stat.S_IMODE(source.st_mode))


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
