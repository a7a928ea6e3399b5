"""What the machine is: card, driver, versions, commit."""

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..environment import commit, machine, versions
from .part import Record, part

_PACKAGES = ("torch", "triton", "transformers", "numpy", "numba", "safetensors", "pytest", "pytest-xdist", "matplotlib")
_QUERY = "name,driver_version,memory.total,power.limit,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _nvidia_smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    done = subprocess.run([tool, f"--query-gpu={_QUERY}", "--format=csv,noheader"], capture_output=True, text=True)
    return dict(zip(_QUERY.split(","), map(str.strip, done.stdout.partition("\n")[0].split(",")), strict=False))


def measure(device: torch.device, record: Record) -> None:
    """Names the card, its driver, the versions of what is installed, and the commit."""
    record["commit"] = commit()
    record["machine"] = machine(device)
    record["versions"] = versions(device) | {package: _installed(package) for package in _PACKAGES}
    record["nvidia_smi"] = _nvidia_smi()
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        record["gpu"] = {
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }


if __name__ == "__main__":
    part(measure)()
