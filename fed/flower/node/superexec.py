"""Runs ``flower-superexec`` for ``supernode``, and forks its ClientApps from a process that has imported Flower."""

import json
import os
import signal
import subprocess
import sys
from typing import IO, Any

from ..polling import POLL_SECONDS, shorten_backoff
from .supernode import replace_module

_CLIENT_APP = "flwr-clientapp"


def main() -> None:
    """Runs the SuperExec. The process that forks is created first, before this one has threads and connections."""
    shorten_backoff()
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.close(write_end)
        with open(read_end, encoding="utf-8") as commands:
            _fork_client_apps(commands)
        os._exit(0)
    os.close(read_end)
    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", str(POLL_SECONDS))
    with open(write_end, "w", encoding="utf-8", buffering=1) as commands:
        _run_superexec(commands)


def _run_superexec(commands: IO[str]) -> None:
    """Runs ``flower-superexec``, which writes the commands of ClientApps to a pipe instead of starting them."""
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec.executor import subprocess_executor

    def start(command: list[str], **named: Any) -> "subprocess.Popen[bytes] | None":
        if command[0] != _CLIENT_APP:
            return subprocess.Popen(command, **named)
        commands.write(json.dumps(command) + "\n")
        return None

    replace_module(subprocess_executor, "subprocess", Popen=start)
    sys.argv[0] = "flower-superexec"
    flower_superexec()


def _fork_client_apps(commands: IO[str]) -> None:
    """Forks a ClientApp for each line of a pipe, its command as JSON; returns when the writing process has ended."""
    # imported here once; each fork would import it again
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the pipe ends this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for the forks
    for line in commands:
        if os.fork() == 0:
            for number in (signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            sys.argv = json.loads(line)
            status = 1
            try:
                flwr_clientapp()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)


if __name__ == "__main__":
    main()
