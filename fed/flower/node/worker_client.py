"""The way from a short-lived process to the worker that holds the model: a socket that only this user can reach.

A frame is JSON, then bytes; nothing is pickled. The worker is started by whoever needs it first.
"""

import fcntl
import hashlib
import json
import os
import secrets
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from ....engine.errors import WorkerError

FrameHeader = dict[str, Any]
# Seconds for a worker to listen: it does so before it loads anything.
_START = 60.0
# Bytes of a Unix socket's address, on the systems that allow least.
_LONGEST = 103
# What a worker does that is told to end.
END = "end"
_MODULE = "meerkat_engine.fed.flower.node.worker"


def runtime_directory() -> Path:
    """The directory of this user's sockets; made if need be.

    Raises:
        WorkerError: if it is not this user's alone.
    """
    path = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"meerkat-engine-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()  # not of what a link leads to
    except OSError as error:
        raise WorkerError(f"cannot make {path} for the worker's socket: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise WorkerError(
            f"{path} must be a directory that is yours and that nobody else may enter, for the worker's socket; remove "
            f"it, or set XDG_RUNTIME_DIR"
        )
    return path


class WorkerClient:
    """A worker by its name; it may run or not.

    Args:
        name: what it is for; the same words lead to the same worker.
        parent: process id; the worker ends when this process has ended.

    Raises:
        WorkerError: if there is no place for its socket.
    """

    def __init__(self, name: str, parent: int) -> None:
        self._place = runtime_directory() / hashlib.sha256(f"{name} {parent}".encode()).hexdigest()[:16]
        self._parent = parent
        if len(os.fsencode(self._place)) + len(".sock") > _LONGEST:
            raise WorkerError(
                f"{self._place.parent} is too long for a socket's address; set XDG_RUNTIME_DIR to a shorter one"
            )

    def ask(self, header: FrameHeader, payload: bytes, seconds: float) -> tuple[FrameHeader, bytes]:
        """Sends a frame and waits for the answer; starts the worker if it does not run.

        Raises:
            WorkerError: if it cannot be started, ends, or takes longer.
        """
        with self._reached(seconds) as connection:
            try:
                connection.send_bytes(json.dumps(header).encode())
                connection.send_bytes(payload)
                if not connection.poll(seconds):
                    raise WorkerError(f"the worker did not answer within {seconds:g} s")
                return json.loads(connection.recv_bytes()), connection.recv_bytes()
            except (OSError, EOFError) as error:
                raise WorkerError(f"the worker ended before it answered ({error or 'end of file'})") from error

    def end(self) -> None:
        """Has the worker end, if it runs; raises ``WorkerError`` if it lets nobody in."""
        with self._locked():
            connection = self._connected(_START)
        if connection is not None:
            with connection:
                connection.send_bytes(json.dumps({"do": END}).encode())
                connection.send_bytes(b"")

    @contextmanager
    def _reached(self, seconds: float) -> Iterator[Connection]:
        with self._locked():  # of two that need it, one starts it
            connection = self._connected(seconds) or self._started()
        with connection:
            yield connection

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._place.with_suffix(".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _connected(self, seconds: float) -> "Connection | None":
        """A connection, or None if no worker listens; raises ``WorkerError`` if one does, and says nothing."""
        try:
            key = self._place.with_suffix(".key").read_bytes()
            connection = Client(str(self._place.with_suffix(".sock")), family="AF_UNIX")
            if not connection.poll(seconds):  # Client, given the key, would wait for good
                connection.close()
                raise WorkerError(f"the worker did not answer within {seconds:g} s")
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
        except (OSError, EOFError, AuthenticationError):  # none, or the leavings of one that was killed
            return None
        return connection

    def _started(self) -> "Connection":
        key = self._place.with_suffix(".key")
        for left in (key, self._place.with_suffix(".sock")):
            left.unlink(missing_ok=True)
        with open(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(self._place), str(self._parent)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # it outlives the process that starts it
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        until = time.monotonic() + _START
        while time.monotonic() < until:
            if (connection := self._connected(_START)) is not None:
                process.returncode = 0  # not waited for: it is no child of ours to look after
                return connection
            if process.poll() is not None:
                raise WorkerError(f"the worker ended at once, with status {process.returncode}; it says why above")
            time.sleep(0.05)
        process.kill()
        raise WorkerError(f"the worker did not listen within {_START:g} s")


__all__ = ["END", "FrameHeader", "WorkerClient", "runtime_directory"]
