"""Kills runs and goes on with them. Run as a program of its own, with the packages loaded once and a process per run:

    python -m helpers.killing DIRECTORY KIND KILLS SEED SETTING=VALUE ...

The kind is "time" (SIGKILL from outside after a random time) or "write" (SIGKILL at a random one of all the writes,
renames, truncations and fsyncs; a write may get half way). A trial kills a run up to three times and goes on with it;
then its directory is compared with that of a run that was never stopped. Trials go on until there were so many kills.
The last line of the output is JSON.
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
    """Reports nothing."""


def begin_or_go_on(config: Any, path: Path) -> None:
    """What a user does: resumes, or starts again where nothing had been written."""
    try:
        resume(path, quiet, quiet)
    except RunError as error:
        if "no run to go on with" not in str(error):
            raise
        execute(config, path, quiet, quiet)


class Writes:
    """Counts what changes files, and kills this process at one of the changes."""

    def __init__(self, directory: Path, at: int | None, share: float) -> None:
        self.count, self._at, self._share, self._directory = 0, at, share, str(directory)

    def due(self) -> bool:
        self.count += 1
        return self.count - 1 == self._at

    def install(self) -> None:
        for name in ("fsync", "replace", "truncate", "unlink", "mkdir"):
            setattr(os, name, self._watched(getattr(os, name)))
        plain, writes = builtins.open, self

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
                return plain(file, mode, buffering, *args, **named)
            raw = Raw(file, mode)
            return raw if buffering == 0 else io.BufferedWriter(raw)

        builtins.open = watched_open

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if self.due():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **named)

        return call


def in_a_process(work: Callable[[], Any], kill_after: float | None = None) -> tuple[int, float]:
    """Runs something in a process of its own; its status (-9: killed) and the seconds it took."""
    begun = time.monotonic()
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
    return os.waitstatus_to_exitcode(code), time.monotonic() - begun


def without_times(line: Any) -> Any:
    if isinstance(line, dict):
        return {name: without_times(value) for name, value in line.items() if name not in TIMES}
    return line


def contents(path: Path) -> dict[str, Any]:
    """Everything in a run directory that a stop must not change."""
    found: dict[str, Any] = {each.name: each.read_bytes() for each in path.iterdir() if each.name != ".lock"}
    for name in found:
        if name.endswith(".safetensors"):  # which writes its metadata in any order
            with safe_open(path / name, framework="np") as file:
                found[name] = file.metadata(), {key: file.get_tensor(key).tobytes() for key in sorted(file.keys())}
    found["metrics.jsonl"] = [without_times(json.loads(line)) for line in found["metrics.jsonl"].splitlines()]
    return found


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(directory: Path, kind: str, wanted: int, seed: int, *settings: str) -> None:
    torch.set_num_threads(1)
    given = dict(each.split("=") for each in settings)
    config = make_config(
        {name: int(value) if value.isdigit() else value for name, value in given.items()} | {"backend": "torch"}
    )
    events = directory / "events"

    def undisturbed() -> None:
        writes = Writes(directory / "whole", None, 1.0)
        writes.install()
        execute(config, directory / "whole", quiet, quiet)
        events.write_text(str(writes.count))

    status, whole_time = in_a_process(undisturbed)
    assert status == 0
    expected, total = contents(directory / "whole"), int(events.read_text())
    random, points, trial = Random(seed), [], 0
    while len(points) < wanted:
        path = directory / f"trial-{trial}"

        def disturbed(path: Path, at: int | None, share: float) -> None:
            Writes(path, at, share).install()
            begin_or_go_on(config, path)

        for attempt in range(4):
            share = random.random()
            at = random.randrange(total) if kind == "write" and attempt < 3 else None
            after = share * whole_time if kind == "time" and attempt < 3 else None
            status, _ = in_a_process(functools.partial(disturbed, path, at, share), after)
            if status == 0:
                break
            assert status == -signal.SIGKILL, f"trial {trial}, attempt {attempt}: exit status {status}"
            points.append(lines_in(path / "ledger.jsonl"))
        found = contents(path)
        assert found.keys() == expected.keys(), f"trial {trial}: {found.keys() ^ expected.keys()}"
        for name in expected:
            assert found[name] == expected[name], f"trial {trial}: {name} differs"
        trial += 1
    print(json.dumps({"trials": trial, "kills": len(points), "ledger_lines_at_kill": points, "events": total}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
