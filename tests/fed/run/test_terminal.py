"""The progress bar on a pseudo-terminal. ``test_run`` checks that there is none without a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path


def run_on_terminal(*arguments: str) -> str:
    """Runs a command on a pseudo-terminal of 30 rows and 160 columns. Returns its output."""
    own_end, command_end = pty.openpty()
    fcntl.ioctl(command_end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 160, 0, 0))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
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


def test_the_bar_shows_round_loss_accuracy_speed_and_bytes(tmp_path: Path) -> None:
    text = run_on_terminal("run", "--rounds", "3", "--local-steps", "2", "--eval-every", "2",
                           "--calibration-texts", "64", "--output", str(tmp_path / "r"))  # fmt: skip
    assert "calibrating" in text
    bars = [line for line in re.split(r"[\r\n]+", text) if "round/s" in line or "s/round" in line]
    last = bars[-1]
    assert "3/3" in last
    assert re.search(r"loss=0\.\d{4}, accuracy=[01]\.\d{4}, steps/s=\d+\.\d\d, bytes=1\.\d kB", last), last
    assert any("1/3" in line for line in bars)
