"""What ``supernode`` starts for ``flower-superexec``: it forks ClientApps off a process that has imported Flower."""

import json
import os
import signal
import subprocess
import sys
from typing import IO, Any

from ..polling import LOOK, shorten_backoff
from .supernode import replaced

_CLIENT_APP = "flwr-clientapp"


def main() -> None:
    """Runs the SuperExec; the process to fork off is there before it has threads and connections."""
    shorten_backoff()
    commands, theirs = os.pipe()
    if os.fork() == 0:
        os.close(theirs)
        with open(commands, encoding="utf-8") as lines:
            _fork_for(lines)
        os._exit(0)
    os.close(commands)
    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", str(LOOK))
    with open(theirs, "w", encoding="utf-8", buffering=1) as lines:
        _run(lines)


def _run(commands: IO[str]) -> None:
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec.executor import subprocess_executor

    def start(command: list[str], **named: Any) -> "subprocess.Popen[bytes] | None":
        if command[0] != _CLIENT_APP:
            return subprocess.Popen(command, **named)
        commands.write(json.dumps(command) + "\n")
        return None

    replaced(subprocess_executor, "subprocess", Popen=start)
    sys.argv[0] = "flower-superexec"
    flower_superexec()


def _fork_for(lines: IO[str]) -> None:
    """Forks a ClientApp for each line, its command; until whoever writes them has ended."""
    # what the processes that are forked off would import, each for itself
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pipe's end says when to end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in lines:
        if os.fork() == 0:
            for each in (signal.SIGINT, signal.SIGCHLD):
                signal.signal(each, signal.SIG_DFL)
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
