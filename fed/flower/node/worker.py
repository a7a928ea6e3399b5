"""A node's worker: ``python -m meerkat_engine.fed.flower.node.worker PREFIX PARENT``, started by ``worker_client``.

It keeps the model from one message to the next and answers one message at a time. It ends when its parent process has
ended, or after a long time without messages.
"""

import fcntl
import json
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import NoReturn

from .worker_client import END

_LOG = logging.getLogger("meerkat.worker")
# Seconds without a message after which the worker ends, unless the last message set ``idle``.
_IDLE_SECONDS = 3600.0


def main(prefix: Path, parent: int) -> None:
    """Serves until the parent ends, a message or SIGTERM ends the worker, or none comes for long.

    Args:
        prefix: path of the worker's files without their suffixes ``.sock``, ``.key`` and ``.lock``.
        parent: process id of the parent.
    """
    os.umask(0o077)
    socket, key = prefix.with_suffix(".sock"), prefix.with_suffix(".key")
    threading.Thread(target=_end_with_parent, args=(parent, prefix), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: _end(prefix))
    with Listener(str(socket), family="AF_UNIX", backlog=8, authkey=key.read_bytes()) as listener:
        connections: queue.Queue[Connection] = queue.Queue()
        threading.Thread(target=_accept, args=(listener, connections), daemon=True).start()
        _serve(connections, prefix)


def _serve(connections: "queue.Queue[Connection]", prefix: Path) -> None:
    from .handler import RequestHandler  # loads torch, which takes long: connections are accepted meanwhile

    handler, idle = RequestHandler(), _IDLE_SECONDS
    while True:
        try:
            connection = connections.get(timeout=idle)
        except queue.Empty:
            with open(prefix.with_suffix(".lock"), "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # no process is connecting while this one holds the lock
                if connections.empty():
                    _LOG.info("no message within %g s: the worker ends", idle)
                    _end(prefix)
            continue
        with connection:
            try:
                header, payload = json.loads(connection.recv_bytes()), connection.recv_bytes()
                if header["do"] == END:
                    _end(prefix)
                idle = float(header.get("idle", _IDLE_SECONDS))
                header, payload = handler.handle(header, payload)
                connection.send_bytes(json.dumps(header).encode())
                connection.send_bytes(payload)
            except (OSError, EOFError):
                _LOG.warning("the process that sent the message ended before it was answered")


def _accept(listener: Listener, connections: "queue.Queue[Connection]") -> None:
    """Accepts and queues connections, so that connecting does not wait for the worker's current message."""
    while True:
        try:
            connections.put(listener.accept())
        except AuthenticationError:
            _LOG.warning("rejected a connection that did not have the key")
        except (OSError, EOFError):
            time.sleep(0.1)


def _end_with_parent(parent: int, prefix: Path) -> None:
    """Ends this process, whatever it is doing, when the parent has ended."""
    _wait_for_exit(parent)
    _end(prefix)


def _wait_for_exit(process: int) -> None:
    """Returns when a process has ended."""
    try:
        if hasattr(os, "pidfd_open"):  # Linux: immune to reuse of the process id
            select.select([os.pidfd_open(process)], [], [])
            return
        while True:
            os.kill(process, 0)
            time.sleep(0.5)
    except ProcessLookupError:
        return


def _end(prefix: Path) -> NoReturn:
    for suffix in (".sock", ".key"):  # the lock file stays: another process may be waiting for the lock
        prefix.with_suffix(suffix).unlink(missing_ok=True)
    os._exit(0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main(Path(sys.argv[1]), int(sys.argv[2]))
