"""The progress bar on a real (pseudo) terminal; that it is silent elsewhere is in test_run."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path


def on_a_terminal(*arguments: str) -> str:
    """Output of the command line on a terminal of 30 rows and 160 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 160, 0, 0))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "meerkat_engine", *arguments]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not data:
            break
        seen += data
    os.close(ours)
    assert child.wait() == 0, seen.decode()
    return seen.decode()


def test_the_bar_shows_round_loss_accuracy_speed_and_bytes(tmp_path: Path) -> None:
    text = on_a_terminal("run", "--rounds", "3", "--local-steps", "2", "--eval-every", "2", "--calibration-texts", "64",
                         "--output", str(tmp_path / "r"))  # fmt: skip
    assert "calibrating" in text
    drawn = [line for line in re.split(r"[\r\n]+", text) if "round/s" in line or "s/round" in line]
    last = drawn[-1]
    assert "3/3" in last
    assert re.search(r"loss=0\.\d{4}, accuracy=[01]\.\d{4}, steps/s=\d+\.\d\d, bytes=1\.\d kB", last), last
    assert any("1/3" in line for line in drawn)
