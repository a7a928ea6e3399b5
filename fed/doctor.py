"""The command ``meerkat-engine doctor``: what this installation and this machine can do, and what is missing."""

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

import click
import torch
from packaging.requirements import Requirement
from torch import nn

from ..engine.errors import RunError
from ..engine.extras import install_hint
from ..engine.lm.hub_connection import hub_state
from ..engine.mask import SparseMask
from ..engine.optimizer import SparseZO
from ..engine.parameters import fingerprint
from .config.options import example
from .run.directory import RunDirectory

_PACKAGE = "meerkat-engine"
_VERSIONS = ("torch", "triton", "transformers", "datasets", "safetensors", "numpy")
_NOT_FOR_USERS = ("test", "dev", "frameworks")  # extras of those who change the package
_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the diagnosis.

    Args:
        name: what was looked at.
        text: what was found, for people; begins with what matters most.
        data: the same for programs.
        problem: whether something that every user needs does not work.
    """

    name: str
    text: str
    data: dict[str, Any] = field(default_factory=dict)
    problem: bool = False


@click.command(epilog=example("meerkat-engine doctor --output runs"))
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs"), show_default=True,
              help="directory where run directories will be")  # fmt: skip
@click.option("--offline", is_flag=True, help="do not ask the Hugging Face hub for an answer")
@click.option("--json", "as_json", is_flag=True, help="print JSON, for programs and for reports of errors")
def doctor(output: Path, offline: bool, as_json: bool) -> None:
    """Says what this installation can do on this machine, and what is missing.

    Exits with code 1 if something does not work that every run needs.
    """
    found: list[Finding] = []
    for finding in diagnosis(output, ask_hub=not offline):
        found.append(finding)
        if not as_json:
            mark = "PROBLEM: " if finding.problem else ""
            click.echo(f"{finding.name:<13} {mark}{finding.text}")
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=1))
    if any(finding.problem for finding in found):
        raise SystemExit(1)


def diagnosis(output: Path, *, ask_hub: bool) -> Iterator[Finding]:
    """Looks at one thing after the other; the network last.

    Args:
        output: directory where run directories will be.
        ask_hub: whether to send one request to the Hugging Face hub.
    """
    yield _versions()
    yield _cpu()
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    yield from (_gpu(device) for device in gpus) if gpus else [_no_gpu()]
    yield _triton()
    for device in (torch.device("cpu"), *gpus):
        yield _steps(device)
    yield _extras()
    yield _directory(output)
    yield _hub(ask=ask_hub)


def _versions() -> Finding:
    data = {"python": platform.python_version(), _PACKAGE: _version(_PACKAGE) or "not installed"}
    data |= {name: found for name in _VERSIONS if (found := _version(name)) is not None}
    text = ", ".join(f"{name} {number}" for name, number in data.items())
    return Finding(name="versions", text=f"{text}; {platform.platform()}", data=data)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> Finding:
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    speedup = _seconds(torch.float32) / _seconds(torch.bfloat16)
    advice = "faster with --dtype bfloat16" if speedup > 1.2 else "leave --dtype at float32"
    size = f", {memory / 1e9:.1f} GB of memory" if memory else ""
    text = (
        f"{cores} cores, {threads} threads{size}; products of matrices take bfloat16 "
        f"{1 / speedup:.2f} of the time of float32: {advice}"
    )
    data = {"cores": cores, "threads": threads, "memory_bytes": memory, "bfloat16_speedup": round(speedup, 2)}
    return Finding(name="cpu", text=text, data=data)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest time of a product of matrices as large as those of a small language model."""
    a, b = (torch.ones(rows, 1024, dtype=dtype, device="cpu") for rows in (256, 1024))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        nn.functional.linear(a, b)
        times.append(time.perf_counter() - start)
    return min(times)


def _gpu(device: torch.device) -> Finding:
    free, total = torch.cuda.mem_get_info(device)
    of = torch.cuda.get_device_properties(device)
    with torch.cuda.device(device):
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    text = (
        f"{of.name}, compute capability {of.major}.{of.minor}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free; "
        f"{'bfloat16' if bfloat16 else 'no bfloat16: --dtype float16 or float32'}"
    )
    data = {"name": of.name, "capability": [of.major, of.minor], "free_bytes": free, "memory_bytes": total,
            "bfloat16": bfloat16}  # fmt: skip
    return Finding(name=str(device), text=text, data=data)


def _no_gpu() -> Finding:
    build = torch.version.cuda or torch.version.hip
    reason = f"torch is built for {build}, but sees no device" if build else "torch is a build for CPUs"
    return Finding(name="gpu", text=f"none: {reason}", data={"devices": 0, "build": build})


def _triton() -> Finding:
    found, interpreted = _version("triton"), os.environ.get("TRITON_INTERPRET") == "1"
    if found is None:
        text = "absent: masked operations are those of torch or numba, with the same bits"
    elif interpreted:
        text = f"{found}, interpreted (TRITON_INTERPRET=1): slow, for tests"
    elif torch.cuda.is_available():
        text = f"{found}, compiled for the GPU"
    else:
        text = f"{found}, not used without a GPU: masked operations are those of torch or numba, with the same bits"
    return Finding(name="triton", text=text, data={"version": found, "interpreted": interpreted})


def _steps(device: torch.device) -> Finding:
    """Takes a few steps with the device's own operations, and compares their bits with the reference on the CPU."""
    try:
        same = _bits(device, "auto") == _bits(torch.device("cpu"), "torch")
    except Exception as error:  # a diagnosis names what fails, of whatever kind
        text = f"{device}: {_STEPS} steps failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        return Finding(name="steps", text=text, data={"device": str(device)}, problem=True)
    text = f"{device}: {_STEPS} sparse steps have {'the bits' if same else 'OTHER BITS than those'} of the reference"
    return Finding(name="steps", text=text, data={"device": str(device), "same_bits": same}, problem=not same)


def _bits(device: torch.device, backend: str) -> str:
    """Digest of a small model's weights after some steps whose losses are exact on any device."""
    layer = nn.Linear(64, 64, bias=False, device=device, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.copy_((torch.arange(4096, device=device) % 17).view(64, 64) / 16)
    mask = SparseMask.random(layer, density=0.1, seed=1)
    optimizer = SparseZO(layer, mask, lr=0.5, eps=2.0**-10, seed=1, backend=backend)
    losses = iter([1.0, 0.5] * _STEPS)
    for _ in range(_STEPS):
        optimizer.step(lambda: next(losses))
    return fingerprint(layer.cpu())


def _extras() -> Finding:
    if _version(_PACKAGE) is None:
        return Finding(name="extras", text="unknown, because the package is not installed, only on Python's path")
    needed = {extra: _packages(extra) for extra in metadata(_PACKAGE).get_all("Provides-Extra") or []}
    missing = {
        extra: lacking
        for extra, packages in needed.items()
        if extra not in _NOT_FOR_USERS and (lacking := sorted({p.name for p in packages if not _satisfied(p)}))
    }
    present = [extra for extra in needed if extra not in (*_NOT_FOR_USERS, *missing)]
    text = ", ".join(present) or "none"
    if missing:
        lacks = "; ".join(f"{extra} ({', '.join(names)})" for extra, names in missing.items())
        text += f"; missing: {lacks}; to get one, {install_hint(next(iter(missing)))}"
    return Finding(name="extras", text=text, data={"present": present, "missing": missing})


def _packages(extra: str) -> list[Requirement]:
    """The packages that an extra adds."""
    markers = [(r, r.marker) for text in requires(_PACKAGE) or [] if (r := Requirement(text)).marker]
    return [r for r, marker in markers if marker and marker.evaluate({"extra": extra}) > marker.evaluate({"extra": ""})]


def _satisfied(requirement: Requirement) -> bool:
    found = _version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _directory(output: Path) -> Finding:
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    trial = output / f".doctor-{os.getpid()}"
    made = not output.exists()
    try:
        with RunDirectory(trial):
            pass
    except RunError as error:
        return Finding(name="runs", text=str(error), data={"directory": str(output), "writable": False}, problem=True)
    shutil.rmtree(trial)
    if made:
        output.rmdir()
    text = f"{output} can be written; {free / 1e9:.1f} GB free"
    return Finding(name="runs", text=text, data={"directory": str(output), "writable": True, "free_bytes": free})


def _hub(*, ask: bool) -> Finding:
    state = hub_state(ask=ask)
    text = f"{state.endpoint} {state.answer}; cache {state.cache}"
    data = {"endpoint": state.endpoint, "answers": state.answers, "cache": str(state.cache)}
    return Finding(name="hub", text=text, data=data)


__all__ = ["Finding", "diagnosis", "doctor"]
