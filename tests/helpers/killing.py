"""Kills and resumes runs. A program, which loads the packages once and forks a process for each attempt:

    python -m helpers.killing DIRECTORY KIND KILLS SEED SETTING=VALUE ...

KIND is "time" (SIGKILL from outside after a random time) or "write" (SIGKILL at a random one of all writes, renames,
truncations and fsyncs; a write may be done in part). A trial kills and resumes a run up to three times and then lets it
finish. Its directory is compared with that of a run that was never stopped. Trials are repeated until there were KILLS
kills. The last line of the output is a report in JSON.
"""

import builtins
import functools
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open

from meerkat_engine.engine.errors import RunError
from meerkat_engine.fed import execute, make_config
from meerkat_engine.fed.run.execute import resume

TIMES = {"seconds", "seconds_in_steps", "seconds_in_forwards", "seconds_per_step", "forward_share_of_step"}


def quiet(*_: object) -> None:
    """Ignores what a run reports."""


def resume_or_start(config: Any, path: Path) -> None:
    """Resumes a run, as a user would, or starts it if nothing had been written."""
    try:
        resume(path, quiet, quiet)
    except RunError as error:
        if "holds no run to resume" not in str(error):
            raise
        execute(config, path, quiet, quiet)


class Writes:
    """Counts the changes of files, and kills this process at one of them.

    Args:
        directory: changes of open files count only in this directory.
        at: number of the change at which to kill; None: never.
        share: share of the data that is written if the change is a write, in [0, 1].
    """

    def __init__(self, directory: Path, at: int | None, share: float) -> None:
        self.count, self._at, self._share, self._directory = 0, at, share, str(directory)

    def due(self) -> bool:
        """Counts a change. Returns whether to kill the process at it."""
        self.count += 1
        return self.count - 1 == self._at

    def install(self) -> None:
        """Replaces the functions of this process that change files."""
        for name in ("fsync", "replace", "truncate", "unlink", "mkdir"):
            setattr(os, name, self._watched(getattr(os, name)))
        original_open, writes = builtins.open, self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                if writes.due():
                    super().write(bytes(data)[: int(len(data) * writes._share)])
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().write(data)

            def truncate(self, size: int | None = None) -> int:
                if writes.due():
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().truncate(size)

        def watched_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **named: Any) -> Any:
            if not str(file).startswith(writes._directory) or "b" not in mode or mode == "rb":
                return original_open(file, mode, buffering, *args, **named)
            raw = Raw(file, mode)
            return raw if buffering == 0 else io.BufferedWriter(raw)

        builtins.open = watched_open

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if self.due():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **named)

        return call


def run_in_process(work: Callable[[], Any], kill_after: float | None = None) -> tuple[int, float]:
    """Runs a function in a forked process.

    Args:
        work: the function.
        kill_after: seconds after which the process is killed; None: never.

    Returns:
        Exit status (-9: killed), and seconds that the process ran.
    """
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, code = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(code), time.monotonic() - start


def without_times(line: Any) -> Any:
    """A copy of a line of the metrics without its times."""
    if isinstance(line, dict):
        return {name: without_times(value) for name, value in line.items() if name not in TIMES}
    return line


def contents(path: Path) -> dict[str, Any]:
    """The contents of a run directory that must not depend on whether the run was stopped, by file."""
    found = [file for file in path.iterdir() if file.is_file() and file.name != ".lock"]
    files: dict[str, Any] = {file.name: file.read_bytes() for file in found}
    for name in files:
        if name.endswith(".safetensors"):  # the order of its metadata varies
            with safe_open(path / name, framework="np") as tensors:
                files[name] = (
                    tensors.metadata(),
                    {key: tensors.get_tensor(key).tobytes() for key in sorted(tensors.keys())},
                )
    files["metrics.jsonl"] = [without_times(json.loads(line)) for line in files["metrics.jsonl"].splitlines()]
    return files


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(directory: Path, kind: str, kills: int, seed: int, *settings: str) -> None:
    """Runs the program; see the module for the arguments."""
    torch.set_num_threads(1)
    given = dict(setting.split("=") for setting in settings)
    config = make_config(
        {name: int(value) if value.isdigit() else value for name, value in given.items()} | {"backend": "torch"}
    )
    count_file = directory / "events"

    def undisturbed() -> None:
        writes = Writes(directory / "undisturbed", None, 1.0)
        writes.install()
        execute(config, directory / "undisturbed", quiet, quiet)
        count_file.write_text(str(writes.count))

    status, undisturbed_seconds = run_in_process(undisturbed)
    assert status == 0
    expected, changes = contents(directory / "undisturbed"), int(count_file.read_text())
    random, ledger_lines, trial = Random(seed), [], 0
    while len(ledger_lines) < kills:
        path = directory / f"trial-{trial}"

        def disturbed(path: Path, at: int | None, share: float) -> None:
            Writes(path, at, share).install()
            resume_or_start(config, path)

        for attempt in range(4):
            share = random.random()
            at = random.randrange(changes) if kind == "write" and attempt < 3 else None
            after = share * undisturbed_seconds if kind == "time" and attempt < 3 else None
            status, _ = run_in_process(functools.partial(disturbed, path, at, share), after)
            if status == 0:
                break
            assert status == -signal.SIGKILL, f"trial {trial}, attempt {attempt}: exit status {status}"
            ledger_lines.append(count_lines(path / "ledger.jsonl"))
        files = contents(path)
        assert files.keys() == expected.keys(), f"trial {trial}: {files.keys() ^ expected.keys()}"
        for name in expected:
            assert files[name] == expected[name], f"trial {trial}: {name} differs"
        trial += 1
    print(
        json.dumps(
            {
                "trials": trial,
                "kills": len(ledger_lines),
                "ledger_lines_at_kill": ledger_lines,
                "events": changes,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
