"""Where a measurement comes from: machine, versions, commit, and the command that asked for it."""

import contextlib
import platform
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on, and how many CPU threads torch took."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "threads": torch.get_num_threads()}
    return {"device": f"{_processor()} CPU", "threads": torch.get_num_threads()}


def versions(device: torch.device) -> dict[str, str]:
    """Of Python and of what numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numba"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if device.type == "cuda":
        found["HIP" if torch.version.hip else "CUDA"] = str(torch.version.hip or torch.version.cuda)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit of this package, ``-dirty`` where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found or f"unknown (version {version('meerkat-engine')})"


def as_given(context: click.Context) -> str:
    """The command with the options that were given."""
    words = ["meerkat-engine", str(context.info_name)]
    for option in context.command.params:
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            value = context.params[str(option.name)]
            for each in value if isinstance(value, tuple) else (value,):
                words += [option.opts[0], str(each)]
    return shlex.join(words)


__all__ = ["as_given", "commit", "machine", "versions"]
