"""The worker as a real process, reached as a ClientApp reaches it."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import pytest

from meerkat_engine.engine.errors import WorkerError
from meerkat_engine.fed.flower.node.worker_client import WorkerClient, runtime_directory

from helpers.deployment import wait_until, workers

ROUND = {"do": "round", "session": "none", "client": 0}


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory with a short path: a socket's address has at most a hundred bytes."""
    with tempfile.TemporaryDirectory(prefix="mk") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


@pytest.fixture
def parent(runtime: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process that a worker ends with."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()
    wait_until(lambda: not workers(runtime), 10, "the workers ended with their parent")


def sockets_and_keys(runtime: Path) -> list[Path]:
    """The files that a worker leaves behind if it is killed."""
    return [path for path in runtime_directory().iterdir() if path.suffix in (".sock", ".key")]


def test_worker_stays_until_it_is_ended(runtime: Path, parent: subprocess.Popen[bytes]) -> None:
    worker = WorkerClient("one", parent.pid)
    header, payload = worker.ask(ROUND, b"", 60)
    assert header["known"] is False
    assert payload == b""
    (process,) = workers(runtime)
    WorkerClient("one", parent.pid).ask(ROUND, b"", 60)
    assert workers(runtime) == [process]
    for path in sockets_and_keys(runtime):
        assert path.stat().st_mode & 0o077 == 0
    worker.end()
    wait_until(lambda: not workers(runtime), 10, "the worker ended")
    assert sockets_and_keys(runtime) == []
    worker.end()  # does nothing: no worker is running


def test_killed_worker_is_restarted_and_ends_with_its_parent(runtime: Path, parent: subprocess.Popen[bytes]) -> None:
    worker = WorkerClient("one", parent.pid)
    worker.ask(ROUND, b"", 60)
    (process,) = workers(runtime)
    os.kill(process, signal.SIGKILL)
    worker.ask(ROUND, b"", 60)
    (other,) = workers(runtime)
    assert other != process
    parent.kill()
    wait_until(lambda: not workers(runtime), 10, "the worker ended with its parent")
    assert sockets_and_keys(runtime) == []


def test_connection_without_the_key_is_rejected(runtime: Path, parent: subprocess.Popen[bytes]) -> None:
    worker = WorkerClient("one", parent.pid)
    worker.ask(ROUND, b"", 60)
    (socket,) = runtime_directory().glob("*.sock")
    with pytest.raises(AuthenticationError):
        Client(str(socket), family="AF_UNIX", authkey=b"guessed")
    worker.ask(ROUND, b"", 60)
    assert len(workers(runtime)) == 1


def test_error_is_an_answer_and_the_worker_stays(runtime: Path, parent: subprocess.Popen[bytes]) -> None:
    worker = WorkerClient("one", parent.pid)
    assert "error" in worker.ask({"do": "something else"}, b"", 60)[0]
    assert "error" in worker.ask({"do": "setup", "session": "s"}, b"", 60)[0]
    assert worker.ask(ROUND, b"", 60)[0]["known"] is False
    assert len(workers(runtime)) == 1


def test_unanswered_message_is_an_error_after_its_time_limit(runtime: Path, parent: subprocess.Popen[bytes]) -> None:
    worker = WorkerClient("one", parent.pid)
    with pytest.raises(WorkerError, match=r"did not answer within 0\.01 s"):
        worker.ask(ROUND, b"", 0.01)  # the worker loads torch first
    worker.ask(ROUND, b"", 60)
    (process,) = workers(runtime)
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(WorkerError, match="did not answer within 1 s"):
        worker.ask(ROUND, b"", 1)
    os.kill(process, signal.SIGCONT)
    assert worker.ask(ROUND, b"", 60)[0]["known"] is False
    assert workers(runtime) == [process]


def test_a_worker_that_stops_while_it_is_greeted_is_an_error_after_the_time_limit(
    runtime: Path, parent: subprocess.Popen[bytes]
) -> None:
    worker = WorkerClient("one", parent.pid)
    worker._prefix.with_suffix(".key").write_bytes(b"key")
    with Listener(str(worker._prefix.with_suffix(".sock")), family="AF_UNIX") as silent:

        def challenge_and_stop() -> None:
            connections.append(silent.accept())
            connections[0].send_bytes(b"#CHALLENGE#" + b"{sha256}" + bytes(20))

        connections: list[Connection] = []
        thread = threading.Thread(target=challenge_and_stop)
        thread.start()
        with pytest.raises(WorkerError, match=r"did not answer within 0\.5 s"):
            worker.ask(ROUND, b"", 0.5)
        thread.join()
        connections[0].close()


def test_worker_ends_after_the_idle_time_of_its_last_message(runtime: Path, parent: subprocess.Popen[bytes]) -> None:
    worker = WorkerClient("one", parent.pid)
    worker.ask(ROUND | {"idle": 60}, b"", 60)
    time.sleep(2)
    worker.ask(ROUND | {"idle": 0.5}, b"", 60)
    wait_until(lambda: not workers(runtime), 10, "the idle worker ended")
    assert sockets_and_keys(runtime) == []


def test_directory_that_others_may_enter_is_rejected(runtime: Path, tmp_path: Path) -> None:
    path = runtime_directory()
    path.chmod(0o755)
    with pytest.raises(WorkerError, match="nobody else may enter"):
        runtime_directory()
    path.chmod(0o700)
    if os.getuid() == 0:  # only root may change the owner
        os.chown(path, 12345, -1)
        with pytest.raises(WorkerError, match="must be a directory that you own"):
            runtime_directory()
    path.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WorkerError, match="nobody else may enter"):
        runtime_directory()


def test_too_long_path_for_a_socket_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with pytest.raises(WorkerError, match="too long for a socket's address"):
        WorkerClient("one", os.getpid())


def test_client_app_loads_no_torch() -> None:
    code = "import sys, meerkat_engine.fed.flower.node.app; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False False\n", done.stderr
