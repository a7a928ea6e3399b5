"""Commands on a pseudo-terminal, where there is a progress bar."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios


def run_on_terminal(*arguments: str, **variables: str) -> str:
    """Runs a command on a pseudo-terminal of 30 rows and 160 columns. Returns its output.

    Args:
        arguments: the command's arguments.
        variables: environment variables.
    """
    own_end, command_end = pty.openpty()
    fcntl.ioctl(command_end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 160, 0, 0))
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "meerkat_engine", *arguments]
    child = subprocess.Popen(command, stdin=command_end, stdout=command_end, stderr=command_end, env=environment)
    os.close(command_end)
    output = b""
    while True:
        try:
            data = os.read(own_end, 65536)
        except OSError:  # the command closed its end
            break
        if not data:
            break
        output += data
    os.close(own_end)
    assert child.wait() == 0, output.decode()
    return output.decode()
