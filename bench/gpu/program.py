"""``python -m meerkat_engine.bench.gpu``: everything that ten minutes on a GPU can tell, in one command.

Each part is a process with a time limit and JSON of its own. A part that fails or runs out of time is recorded with the
end of its output, and the program goes on.
"""

import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from ...engine.atomic_files import write_atomic
from ...engine.errors import ConfigError, MeerkatError
from ...engine.lm.models import check_device
from .summary import DONE, PROGRAM, STOPPED, SUMMARY, markdown

_LEAST = 5.0  # seconds; with less time left, a part is not started
_TESTS = Path(__file__).resolve().parents[2] / "tests" / "test_gpu.py"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process of the program.

    Args:
        name: name of the part, and of its files.
        command: the command line; a first word "python" stands for this interpreter.
        limit: seconds that it may take.
        kernels: whether it runs the kernels also on a CPU, in Triton's interpreter.
        needs: a file or tool without which it is skipped; None if there is none.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    kernels: bool = False
    needs: str | None = None

    def missing(self) -> str | None:
        """Why the part cannot run here; None if it can."""
        if self.needs is None or Path(self.needs).is_file() or shutil.which(self.needs):
            return None
        return f"{self.needs} is not here"


def parts(device: str, output: Path) -> list[Part]:
    """The parts, in order: bits, kernels, steps, then what may be missing.

    Args:
        device: "cuda" or "cpu"; on a CPU everything is small.
        output: directory of the results.
    """
    on_gpu = device == "cuda"

    def own(module: str, name: str) -> tuple[str, ...]:
        result = str(output / f"{name}.json")
        return ("python", "-m", f"meerkat_engine.bench.gpu.{module}", "--device", device, "--output", result)

    workers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") and on_gpu else ()
    chosen = ("-m", "gpu", *workers) if on_gpu else ("-k", "radius or host_waits")
    shape: tuple[str, ...] = (
        "--model",
        "llama-3.2-1b",
        "--dtype",
        "bfloat16",
        "--batch-size",
        "16",
        "--length",
        "64",
        "--repeats",
        "5",
    )
    if not on_gpu:
        shape = ("--model", "embedded", "--batch-size", "2", "--length", "8", "--repeats", "3")
    memory: tuple[str, ...] = ("--model", "llama-3.2-1b", "--repeats", "3")
    if not on_gpu:
        memory = ("--model", "embedded", "--batch-size", "2", "--length", "6", "--repeats", "2", "--quantize", "int8")
    memory = ("bench-memory", "--device", device, *memory, "--output", str(output / "memory"))
    densities = ("--density", "0.01", "--density", "0.001")
    bench = ("bench", "--device", device, *shape, *densities, "--no-figures", "--output", str(output / "bench"))
    sanitize = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    metrics = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
    second = ("--kernel-name", "regex:_perturb_kernel", "--launch-skip", "1", "--launch-count", "1")
    profile = ("ncu", "--clock-control", "none", *second, "--metrics", metrics)
    return [
        Part(name="machine", command=own("machine", "machine"), limit=40),
        Part(
            name="tests", limit=100, kernels=True, needs=str(_TESTS),
            command=("python", "-m", "pytest", str(_TESTS), "-W", "default", "-p", "no:cacheprovider", *chosen),
        ),
        Part(name="words", command=own("words", "words"), limit=60, kernels=True),
        Part(name="runs", command=own("runs", "runs"), limit=120),
        Part(name="sweep", command=own("sweep", "sweep"), limit=110, kernels=True),
        Part(name="bench", command=("python", "-m", "meerkat_engine", *bench), limit=120),
        Part(name="steps", command=own("steps", "steps"), limit=200),
        Part(name="memory", command=("python", "-m", "meerkat_engine", *memory), limit=150),
        Part(name="pipeline", command=own("pipeline", "pipeline"), limit=100),
        # On a CPU the compiler takes minutes.
        *([Part(name="compiled", command=own("compiled", "compiled"), limit=100)] if on_gpu else []),
        Part(
            name="memcheck", limit=60, needs="compute-sanitizer",
            command=(*sanitize, "memcheck", *own("passes", "memcheck")),
        ),
        Part(
            name="racecheck", limit=60, needs="compute-sanitizer",
            command=(*sanitize, "racecheck", *own("passes", "racecheck")),
        ),
        Part(name="ncu", limit=60, needs="ncu", command=(*profile, *own("one_perturb", "ncu"))),
    ]  # fmt: skip


def environment(device: str, kernels: bool, scratch: Path) -> dict[str, str]:
    """Environment of a part: no network, compiled kernels except on a CPU, and files that are not results elsewhere."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TMPDIR": str(scratch),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TRITON_INTERPRET": "1" if kernels and device == "cpu" else "0",
    }


def run_part(part: Part, limit: float, variables: Mapping[str, str], log: Path) -> dict[str, Any]:
    """Runs a part.

    Args:
        part: the part.
        limit: seconds until it is stopped.
        variables: its environment.
        log: file for its output.

    Returns:
        What became of it: "outcome" (``DONE`` or one of ``STOPPED``), "seconds", "exit_code", and the end of its
        output.
    """
    command = [sys.executable if word == "python" else word for word in part.command]
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=dict(variables), start_new_session=True
        )
        try:
            exit_code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own processes too
                process.wait()
    outcome = DONE if exit_code == 0 else STOPPED[exit_code is None]
    return {
        "outcome": outcome,
        "seconds": round(time.monotonic() - started, 1),
        "limit": round(limit, 1),
        "exit_code": exit_code,
        "command": command,
        "end_of_output": log.read_bytes()[-2000:].decode(errors="replace"),
    }


def _write(path: Path, text: str) -> None:
    write_atomic(path, text.encode(), replaces=lambda _: True)


def _earlier(output: Path) -> dict[str, Any]:
    """The parts that an earlier start has recorded."""
    path = output / PROGRAM
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())["parts"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); choose a new directory for --output") from error
    return found


@click.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="directory for results")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="auto: cuda if available, else cpu, where everything is small")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=9.5, show_default=True,
              help="time for all parts together")  # fmt: skip
@click.option("--part", "chosen", multiple=True, metavar="NAME", help="only these parts; may be repeated")
@click.option("--resume", is_flag=True, help="continue in a directory; parts that are done are not run again")
def main(output: Path, device: str, minutes: float, chosen: tuple[str, ...], resume: bool) -> None:
    """Compares bits with the CPU's, then times kernels and steps: everything for ten minutes on a GPU."""
    try:
        _main(output, device, minutes, chosen, resume)
    except MeerkatError as error:
        raise click.ClickException(str(error)) from error


def _main(output: Path, device: str, minutes: float, chosen: tuple[str, ...], resume: bool) -> None:
    end = time.monotonic() + 60 * minutes
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    if not resume and output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; pass --resume to continue in it, or choose a new directory")
    output = output.absolute()
    program = parts(device, output)
    if unknown := set(chosen) - {part.name for part in program}:
        raise ConfigError(f"unknown part {min(unknown)!r}; known: {', '.join(part.name for part in program)}")
    output.mkdir(parents=True, exist_ok=True)
    found = _earlier(output)
    with tempfile.TemporaryDirectory(prefix="meerkat-gpu-") as scratch:
        for part in program:
            if (chosen and part.name not in chosen) or found.get(part.name, {}).get("outcome") == DONE:
                continue
            left = end - time.monotonic()
            missing = part.missing() or (f"only {max(left, 0):.0f} s were left" if left < _LEAST else None)
            if missing is None:
                click.echo(f"{part.name}: at most {min(part.limit, left):.0f} s", err=True)
                _remove_results(part.name, output)
                variables = environment(device, part.kernels, Path(scratch))
                found[part.name] = run_part(part, min(part.limit, left), variables, output / f"{part.name}.log")
            else:
                found[part.name] = {"outcome": f"skipped: {missing}"}
            click.echo(f"{part.name}: {found[part.name]['outcome']}", err=True)
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            _write(output / PROGRAM, json.dumps({"device": device, "date": date, "parts": found}, indent=1) + "\n")
            _write(output / SUMMARY, markdown(output))
    click.echo(markdown(output))
    if any(record["outcome"] in STOPPED for record in found.values()):
        raise SystemExit(1)


def _remove_results(part: str, output: Path) -> None:
    """Removes what an earlier start of a part has left."""
    (output / f"{part}.json").unlink(missing_ok=True)
    shutil.rmtree(output / part, ignore_errors=True)


__all__ = ["Part", "environment", "main", "parts", "run_part"]
