"""``WorkerClient``: connects a short-lived process to the worker that keeps the model.

They talk over a Unix socket that only this user can reach. A frame is a JSON header, then a payload of bytes; nothing
is pickled. The first process that needs the worker starts it.
"""

import fcntl
import hashlib
import json
import os
import secrets
import socket
import stat
import struct
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
# Seconds within which a new worker must listen; it listens before it loads anything.
_START_SECONDS = 60.0
# Maximum length in bytes of a Unix socket's path, on the systems with the lowest limit.
_MAX_SOCKET_PATH = 103
# Value of a header's ``do`` that ends the worker.
END = "end"
_MODULE = "meerkat_engine.fed.flower.node.worker"


def runtime_directory() -> Path:
    """Returns the directory of this user's sockets, and creates it if necessary.

    Raises:
        WorkerError: if it cannot be created, or others may enter it.
    """
    path = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"meerkat-engine-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()  # does not follow a symbolic link
    except OSError as error:
        raise WorkerError(f"cannot create {path} for the worker's socket: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise WorkerError(
            f"{path}, which holds the worker's socket, must be a directory that you own and nobody else may enter; "
            f"remove it, or set XDG_RUNTIME_DIR"
        )
    return path


class WorkerClient:
    """Client of a worker, which may or may not be running.

    Args:
        name: name of the worker; equal names and parents address the same worker.
        parent: process id; the worker ends when this process has ended.

    Raises:
        WorkerError: if there is no directory for its socket, or the socket's path is too long.
    """

    def __init__(self, name: str, parent: int) -> None:
        self._prefix = runtime_directory() / hashlib.sha256(f"{name} {parent}".encode()).hexdigest()[:16]
        self._parent = parent
        if len(os.fsencode(self._prefix)) + len(".sock") > _MAX_SOCKET_PATH:
            raise WorkerError(
                f"{self._prefix.parent} is too long for a socket's address; set XDG_RUNTIME_DIR to a shorter path"
            )

    def ask(self, header: FrameHeader, payload: bytes, seconds: float) -> tuple[FrameHeader, bytes]:
        """Sends a frame and returns the answer; starts the worker if it is not running.

        Args:
            header: header of the frame; see ``RequestHandler.handle``.
            payload: payload of the frame.
            seconds: time limit for the answer.

        Raises:
            WorkerError: if the worker cannot be started, ends, or does not answer in time.
        """
        with self._connection(seconds) as connection:
            try:
                connection.send_bytes(json.dumps(header).encode())
                connection.send_bytes(payload)
                if not connection.poll(seconds):
                    raise WorkerError(f"the worker did not answer within {seconds:g} s")
                return json.loads(connection.recv_bytes()), connection.recv_bytes()
            except (OSError, EOFError) as error:
                raise WorkerError(f"the worker ended before it answered ({error or 'end of file'})") from error

    def end(self) -> None:
        """Ends the worker if it is running; raises ``WorkerError`` if it accepts no connection."""
        with self._lock():
            connection = self._connect(_START_SECONDS)
        if connection is not None:
            with connection:
                connection.send_bytes(json.dumps({"do": END}).encode())
                connection.send_bytes(b"")

    @contextmanager
    def _connection(self, seconds: float) -> Iterator[Connection]:
        """Connects to the worker, starting it if it is not running."""
        with self._lock():  # so that only one of several processes starts it
            connection = self._connect(seconds) or self._start()
        with connection:
            yield connection

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with open(self._prefix.with_suffix(".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _connect(self, seconds: float) -> "Connection | None":
        """Returns a connection, or None if no worker listens; raises ``WorkerError`` if one listens but is silent."""
        try:
            key = self._prefix.with_suffix(".key").read_bytes()
            connection = Client(str(self._prefix.with_suffix(".sock")), family="AF_UNIX")
            _limit_reads(connection, seconds)  # Client with authkey would wait without a limit
            try:
                answer_challenge(connection, key)
                deliver_challenge(connection, key)
            except BlockingIOError:
                connection.close()
                raise WorkerError(f"the worker did not answer within {seconds:g} s") from None
        except (OSError, EOFError, AuthenticationError):  # no worker, or the files of one that was killed
            return None
        return connection

    def _start(self) -> "Connection":
        """Starts the worker and returns a connection to it."""
        key = self._prefix.with_suffix(".key")
        for leftover in (key, self._prefix.with_suffix(".sock")):
            leftover.unlink(missing_ok=True)
        with open(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(self._prefix), str(self._parent)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # it outlives the process that starts it
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if (connection := self._connect(_START_SECONDS)) is not None:
                process.returncode = 0  # the worker keeps running: Popen must not warn about it
                return connection
            if process.poll() is not None:
                raise WorkerError(
                    f"the worker ended right after its start, with status {process.returncode}; its error is above"
                )
            time.sleep(0.05)
        process.kill()
        raise WorkerError(f"the worker did not listen within {_START_SECONDS:g} s")


def _limit_reads(connection: "Connection", seconds: float) -> None:
    """Sets a time limit for each read from a connection, after which it raises ``BlockingIOError``."""
    whole, fraction = divmod(seconds, 1)
    limit = struct.pack("ll", int(whole), max(1, int(fraction * 1e6)))  # 0 would be no limit
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


__all__ = ["END", "FrameHeader", "WorkerClient", "runtime_directory"]
