"""Python in a new process, where the kernels are compiled: Triton's interpreter is on in the tests' own process."""

import os
import subprocess
import sys


def run_python(*command: str, **environment: str) -> str:
    """Runs Python with these arguments and returns what it prints; fails with its output if it fails."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout
