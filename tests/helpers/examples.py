"""Runs the scripts in ``examples`` as users do."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(script: str, *arguments: object) -> str:
    """Runs an example in a new process with one thread, asserts that it succeeds, and returns its standard output."""
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return finished.stdout


def fingerprints(printed: str) -> list[str]:
    """Returns all fingerprints (64 hexadecimal digits) in the output of an example, in order."""
    return re.findall(r"\b[0-9a-f]{64}\b", printed)
