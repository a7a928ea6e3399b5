"""The resident worker of a node: ``python -m meerkat_engine.fed.flower.node.worker PLACE PARENT``, started by ``link``.

It holds the model from one message to the next, answers one at a time, and ends when the process it belongs to has, or
when nothing was asked for long.
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
# Seconds without a message after which it ends, where none of them said otherwise.
_IDLE = 3600.0


def main(place: Path, parent: int) -> None:
    """Serves until there is nobody left to serve."""
    os.umask(0o077)
    socket, key = place.with_suffix(".sock"), place.with_suffix(".key")
    threading.Thread(target=_watch, args=(parent, place), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: _end(place))
    with Listener(str(socket), family="AF_UNIX", backlog=8, authkey=key.read_bytes()) as listener:
        waiting: queue.Queue[Connection] = queue.Queue()
        threading.Thread(target=_accept, args=(listener, waiting), daemon=True).start()
        _serve(waiting, place)


def _serve(waiting: "queue.Queue[Connection]", place: Path) -> None:
    from .handler import RequestHandler  # loads torch: whoever asks first waits for the answer, not for us to listen

    resident, idle = RequestHandler(), _IDLE
    while True:
        try:
            connection = waiting.get(timeout=idle)
        except queue.Empty:
            with open(place.with_suffix(".lock"), "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # nobody is on the way in
                if waiting.empty():
                    _LOG.info("nothing was asked for %g s", idle)
                    _end(place)
            continue
        with connection:
            try:
                header, payload = json.loads(connection.recv_bytes()), connection.recv_bytes()
                if header["do"] == END:
                    _end(place)
                idle = float(header.get("idle", _IDLE))
                header, payload = resident.handle(header, payload)
                connection.send_bytes(json.dumps(header).encode())
                connection.send_bytes(payload)
            except (OSError, EOFError):
                _LOG.warning("who asked has gone before the answer")


def _accept(listener: Listener, waiting: "queue.Queue[Connection]") -> None:
    """Takes connections, so that nobody waits to be let in while the worker works."""
    while True:
        try:
            waiting.put(listener.accept())
        except AuthenticationError:
            _LOG.warning("someone without the key was turned away")
        except (OSError, EOFError):
            time.sleep(0.1)


def _watch(parent: int, place: Path) -> None:
    """Ends this process, whatever it does, when the other one has ended."""
    _wait_for(parent)
    _end(place)


def _wait_for(process: int) -> None:
    """Returns when a process has ended."""
    try:
        if hasattr(os, "pidfd_open"):  # Linux: nobody else can get its number meanwhile
            select.select([os.pidfd_open(process)], [], [])
            return
        while True:
            os.kill(process, 0)
            time.sleep(0.5)
    except ProcessLookupError:
        return


def _end(place: Path) -> NoReturn:
    for suffix in (".sock", ".key"):  # not the lock, for which somebody may wait
        place.with_suffix(suffix).unlink(missing_ok=True)
    os._exit(0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main(Path(sys.argv[1]), int(sys.argv[2]))
