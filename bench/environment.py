"""Describes the origin of a measurement: machine, versions, commit and command line."""

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
    """Returns the name of the processor or GPU, and the number of CPU threads of torch."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "threads": torch.get_num_threads()}
    return {"device": f"{_processor()} CPU", "threads": torch.get_num_threads()}


def versions(device: torch.device) -> dict[str, str]:
    """Returns the versions of Python, torch and the libraries that the measured times depend on."""
    result = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numba"):
        with contextlib.suppress(PackageNotFoundError):
            result[name] = version(name)
    if device.type == "cuda":
        result["HIP" if torch.version.hip else "CUDA"] = str(torch.version.hip or torch.version.cuda)
    return result


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Returns the commit of this package, with ``-dirty`` if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):  # there is no git
        description = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if description:
            return description
    with contextlib.suppress(PackageNotFoundError):  # it is not installed: ``.types`` is on the path
        return f"unknown (version {version('meerkat-engine')})"
    return "unknown"


def command_line(context: click.Context) -> str:
    """Returns the command line with the options that the user gave."""
    words = ["meerkat-engine", str(context.info_name)]
    for option in context.command.params:
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            value = context.params[str(option.name)]
            if isinstance(value, bool):  # a flag, such as --figures/--no-figures
                words.append((option.opts if value else option.secondary_opts)[0])
                continue
            for item in value if isinstance(value, tuple) else (value,):
                words += [option.opts[0], str(item)]
    return shlex.join(words)


__all__ = ["command_line", "commit", "machine", "versions"]
