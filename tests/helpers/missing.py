"""Processes in which packages cannot be imported, and neither can they in the processes that these start."""

import os
from pathlib import Path

# What a machine with a GPU and a usual set of packages lacks.
MISSING = ("datasets", "gguf", "tomli_w", "dp_accounting", "flwr", "matplotlib")


def environment_without(directory: Path, packages: tuple[str, ...] = MISSING) -> dict[str, str]:
    """Returns the environment of such processes.

    Args:
        directory: a directory for the file that keeps the packages out, which every Python imports when it starts.
        packages: names of the packages.
    """
    (directory / "sitecustomize.py").write_text(f"import sys\nfor name in {packages}: sys.modules[name] = None\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))}
