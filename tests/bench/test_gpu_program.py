"""The program for a machine with a GPU: it runs to its end on a CPU, and a stop or a failure loses one part."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from meerkat_engine import SparseZO
from meerkat_engine.bench import environment as origin
from meerkat_engine.bench.gpu import compiled as compiled_forward
from meerkat_engine.bench.gpu import pipeline, program, runs, steps, summary, sweep, words
from meerkat_engine.bench.gpu.part import Record, part
from meerkat_engine.bench.gpu.program import Part, run_part
from meerkat_engine.triton_kernels import launch

from helpers.graphs import ImitatedGraphs
from helpers.imports import ROOT
from helpers.missing import environment_without

CPU = torch.device("cpu")
BITS_FIRST = ["machine", "tests", "words", "runs", "sweep", "bench", "steps", "memory", "pipeline"]
OPTIONAL = ["memcheck", "racecheck", "ncu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The results of the whole program, and what it printed, without the packages that such a machine may lack."""
    directory: Path = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "meerkat_engine.bench.gpu", "--device", "cpu", "--output", str(directory / "out")]
    done = subprocess.run(command, env=environment_without(directory), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return directory / "out", done.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.timeout(900)  # a minute on an idle machine
def test_every_part_runs_to_its_end_on_a_cpu(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    parts = read(directory / "program.json")["parts"]
    assert list(parts) == BITS_FIRST + OPTIONAL
    assert {name: parts[name]["outcome"] for name in BITS_FIRST} == dict.fromkeys(BITS_FIRST, "done")
    assert all(parts[name]["outcome"].startswith(("done", "skipped: ")) for name in OPTIONAL)
    assert " passed" in parts["tests"]["end_of_output"]


def test_every_part_leaves_its_own_json(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    assert read(directory / "machine.json")["versions"]["torch"] == torch.__version__
    assert read(directory / "words.json")["words"] == {"words": 65537, "radius": 0, "sine": 0, "cosine": 0}
    for name in ("runs", "pipeline"):
        found = read(directory / f"{name}.json")
        assert found["captured"]["replay_on_the_cpu"] == found["eager"]["replay_on_the_cpu"] == "same bits"
        assert found["same_ledger"] is True
        assert all(seconds > 0 for seconds in found["captured"]["seconds_per_step_by_round"])
    swept = {(row["operation"], row["density"], row["config"]) for row in read(directory / "sweep.json")["rows"]}
    operations = {("perturb", d) for d in (0.1, 1.0)} | {("update + perturb", d) for d in (0.1, 1.0)}
    operations |= {("replay", 0.1), ("replay", 1.0), ("inner", 0.1)}
    assert swept == {(*operation, config) for operation in operations for config in ("default", "256 x 2")}
    rows = read(directory / "steps.json")["rows"]
    assert [row["row"] for row in rows] == [
        "meerkat, captured", "meerkat, eager", "dense, fused noise", "dense, one flat noise vector",
        "dense, MeZO's loop", "first-order, AdamW",
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and row["host"] > 0 for row in rows)
    assert rows[0]["scalars"] == rows[1]["scalars"] != []
    assert read(directory / "bench" / "result.json")["kernels"]
    kept = read(directory / "memory" / "result.json")["cases"]
    assert [case["name"] for case in kept] == [
        "in place, float32",
        "int8, float32",
        "int8, float32, both points in one pass",
    ]
    assert all(case["memory"]["step"] > 0 for case in kept)


def test_the_summary_has_a_line_for_each_result(finished: tuple[Path, str]) -> None:
    directory, printed = finished
    page = (directory / "summary.md").read_text()
    assert page in printed
    for expected in ("of 65,537 words differ", "radius 0, sine 0, cosine 0", "same bits", "the same ledger", " passed",
                     "dense, MeZO's loop", "update + perturb", "steps a second", "step / its forwards",
                     f"torch {torch.__version__}", "commit ", "A published figure"):  # fmt: skip
        assert expected in page


def test_a_second_start_runs_nothing_that_is_done(finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = finished
    before = {path.name: path.read_bytes() for path in directory.glob("*.json")}
    monkeypatch.setattr(program, "run_part", lambda *_: pytest.fail("runs a part again"))
    again = CliRunner().invoke(program.main, ["--device", "cpu", "--output", str(directory), "--resume"])
    assert again.exit_code == 0, again.output
    assert {name: (directory / name).read_bytes() for name in before if name != "program.json"} == {
        name: text for name, text in before.items() if name != "program.json"
    }


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the program on parts that are lines of Python, with a limit of seconds each."""

    def run(lines: dict[str, str], *options: str, limit: float = 60, needs: str | None = None) -> Any:
        def parts(_: str, output: Path) -> list[Part]:
            return [
                Part(name=name, command=("python", "-c", line, str(output / f"{name}.json")), limit=limit, needs=needs)
                for name, line in lines.items()
            ]

        monkeypatch.setattr(program, "parts", parts)
        return CliRunner().invoke(program.main, ["--device", "cpu", "--output", str(tmp_path / "out"), *options])

    return run


WRITES = "import sys; open(sys.argv[1], 'w').write('{}')"


def test_a_part_that_fails_is_recorded_and_the_others_go_on(invoke: Callable[..., Any], tmp_path: Path) -> None:
    done = invoke({"first": "print('why'); raise SystemExit(3)", "second": WRITES})
    assert done.exit_code == 1
    parts = read(tmp_path / "out" / "program.json")["parts"]
    assert parts["first"]["outcome"] == "failed"
    assert parts["first"]["exit_code"] == 3
    assert parts["first"]["end_of_output"] == "why\n"
    assert parts["second"]["outcome"] == "done"
    assert "first ended with:\n\n```\nwhy\n```" in (tmp_path / "out" / "summary.md").read_text()
    again = invoke({"first": WRITES, "second": "raise SystemExit(4)"}, "--resume")
    assert again.exit_code == 0, again.output
    assert [part["outcome"] for part in read(tmp_path / "out" / "program.json")["parts"].values()] == ["done"] * 2


def test_a_part_that_takes_too_long_is_stopped_with_its_own_processes(tmp_path: Path) -> None:
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    line = "import subprocess, sys, time; print('so far', flush=True); "
    line += f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    found = run_part(Part(name="slow", command=("python", "-c", line), limit=1), 1.0, os.environ, tmp_path / "log")
    assert found["outcome"] == "out of time"
    assert found["exit_code"] is None
    assert found["end_of_output"] == "so far\n"
    assert 1 <= found["seconds"] < 30
    time.sleep(4)
    assert not (tmp_path / "alive").exists()


def test_parts_that_cannot_run_are_skipped_with_the_reason(invoke: Callable[..., Any], tmp_path: Path) -> None:
    assert invoke({"first": "raise SystemExit(1)"}, needs="no-such-tool").exit_code == 0
    assert read(tmp_path / "out" / "program.json")["parts"]["first"]["outcome"] == "skipped: no-such-tool is not here"


def test_no_part_is_started_without_time_for_it(invoke: Callable[..., Any], tmp_path: Path) -> None:
    assert invoke({"first": "raise SystemExit(1)"}, "--minutes", "0.05").exit_code == 0
    assert read(tmp_path / "out" / "program.json")["parts"]["first"]["outcome"] == "skipped: only 3 s were left"
    assert invoke({"first": WRITES}, "--resume").exit_code == 0
    assert read(tmp_path / "out" / "program.json")["parts"]["first"]["outcome"] == "done"


def test_only_chosen_parts_run(invoke: Callable[..., Any], tmp_path: Path) -> None:
    assert invoke({"first": "raise SystemExit(1)", "second": WRITES}, "--part", "second").exit_code == 0
    assert list(read(tmp_path / "out" / "program.json")["parts"]) == ["second"]
    unknown = invoke({"first": WRITES}, "--resume", "--part", "third")
    assert "unknown part 'third'; known: first" in unknown.output


def test_a_directory_with_files_is_not_written_to(invoke: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "program.json").write_text("{}")
    done = invoke({"first": WRITES})
    assert done.exit_code == 1
    assert "is not empty; pass --resume to continue in it, or choose a new directory" in done.output
    assert "program.json cannot be read" in invoke({"first": WRITES}, "--resume").output
    assert (tmp_path / "out" / "program.json").read_text() == "{}"


def test_kernels_are_compiled_except_on_a_cpu() -> None:
    found = {
        (device, kernels): program.environment(device, kernels, Path("/cache"))["TRITON_INTERPRET"]
        for device in ("cuda", "cpu")
        for kernels in (True, False)
    }
    assert found == {("cuda", True): "0", ("cuda", False): "0", ("cpu", True): "1", ("cpu", False): "0"}
    assert program.environment("cuda", True, Path("/cache"))["HF_HUB_OFFLINE"] == "1"


def test_nothing_but_results_is_left(invoke: Callable[..., Any], tmp_path: Path) -> None:
    line = "import sys, tempfile; where = tempfile.mkdtemp(); open(sys.argv[1], 'w').write('{}'); print(where)"
    assert invoke({"first": line}).exit_code == 0
    where = Path(read(tmp_path / "out" / "program.json")["parts"]["first"]["end_of_output"].strip())
    assert where.is_absolute()
    assert not where.exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "first.json", "first.log", "program.json", "summary.md",
    }  # fmt: skip


def test_the_bits_come_first_and_the_limits_leave_time_for_them(tmp_path: Path) -> None:
    parts = program.parts("cuda", tmp_path)
    assert [part.name for part in parts] == [*BITS_FIRST, "compiled", *OPTIONAL]
    assert sum(part.limit for part in parts[:4]) < 9.5 * 60
    (tests,) = [part for part in parts if part.name == "tests"]
    assert tests.command[tests.command.index("-m", 2) :][:2] == ("-m", "gpu")
    assert tests.command[tests.command.index("-W") + 1] == "default"


def test_what_is_known_is_in_the_file_when_a_part_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    times = iter([{"cold": 1.0}, {"cold": 2.0}])

    def stopped_at_the_third(*_: object, **__: object) -> dict[str, float]:
        try:
            return next(times)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(sweep, "time_action", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        sweep.measure(CPU, Record(tmp_path / "sweep.json"))
    assert [row["cold"] for row in read(tmp_path / "sweep.json")["rows"]] == [1.0, 2.0]


def test_a_configuration_with_other_bits_gets_no_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = sweep.Operands.result

    def wrong(self: sweep.Operands, action: Callable[[], Any]) -> torch.Tensor:
        return result(self, action) + bool(launch._forced)

    monkeypatch.setattr(sweep.Operands, "result", wrong)
    monkeypatch.setattr(sweep, "time_action", lambda *_, **__: {"cold": 1.0})
    with pytest.raises(SystemExit, match=r"other bits than the default configuration: tiny 0\.1 perturb 256 x 2, "):
        sweep.measure(CPU, Record(tmp_path / "sweep.json"))
    rows = read(tmp_path / "sweep.json")["rows"]
    assert {row["config"]: "failed" in row for row in rows} == {"default": False, "256 x 2": True}


def test_words_that_differ_fail_the_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(words, "differing_words", lambda *_: {"words": 5, "radius": 1, "sine": 0, "cosine": 0})
    with pytest.raises(SystemExit, match="not the CPU's bits"):
        words.measure(CPU, Record(tmp_path / "words.json"))
    assert read(tmp_path / "words.json")["words"]["radius"] == 1


def test_a_run_whose_replay_has_other_bits_fails_the_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "replay_run", lambda _: SimpleNamespace(weights="0123"))
    with pytest.raises(SystemExit, match=r"captured: the run ended with .*, replayed: 0123"):
        runs.measure(CPU, Record(tmp_path / "runs.json"))
    assert "0123" in read(tmp_path / "runs.json")["captured"]["replay_on_the_cpu"]


def test_a_step_whose_log_gives_other_weights_gets_no_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rows after it are measured, and find the weights as they were."""
    monkeypatch.setattr(steps, "replay", lambda *_: None)
    with pytest.raises(SystemExit, match="no numbers for: embedded, SST-2, meerkat, captured; embedded, SST-2, meerk"):
        steps.measure(CPU, Record(tmp_path / "steps.json"))
    rows = read(tmp_path / "steps.json")["rows"]
    assert [row.get("failed") for row in rows] == ["the replay of its log gives other weights"] * 2 + [None] * 4


def test_a_row_that_breaks_down_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps, "first_order_steps", too_large)
    with pytest.raises(SystemExit, match=r"no numbers for: embedded, SST-2, first-order, AdamW$"):
        steps.measure(CPU, Record(tmp_path / "steps.json"))
    assert read(tmp_path / "steps.json")["rows"][-1]["failed"] == "OutOfMemoryError: CUDA out of memory"


def test_the_summary_shows_rows_of_a_gpu(tmp_path: Path) -> None:
    place = {"model": "opt-1.3b", "batch": 16, "lengths": "SST-2"}
    seconds = {"seconds": 0.0125, "host": 0.001, "peak_bytes": 3e9, "scalars": [1.0]}
    rows = [
        {**place, "row": "meerkat, captured", **seconds, "not_captured": "why"},
        {**place, "row": "meerkat, eager", **seconds, "not_captured": None},
        {**place, "lengths": "64", "row": "meerkat, captured", **seconds, "not_captured": None},
        {**place, "lengths": "64", "row": "meerkat, eager", **seconds, "scalars": [2.0], "not_captured": None},
        {**place, "row": "first-order, AdamW", "failed": "too large"},
    ]
    swept = {"model": "m", "density": 0.001, "elements": 5, "operation": "perturb", "steps": 1, "config": "256 x 2"}
    counted = "==PROF== done\n    dram__bytes_read.sum   Mbyte   43.1\n    gpu__time_duration.sum us 40\n"
    parts = {"steps": {"outcome": "done", "seconds": 3.2}, "ncu": {"outcome": "done", "end_of_output": counted}}
    texts = {
        "program": {"device": "cuda", "date": "today", "parts": parts},
        "steps": {"rows": rows},
        "compiled": {"rows": [{**place, "row": "meerkat, captured, torch.compile", **seconds, "not_captured": None}]},
        "ncu": {"must_move_bytes": 86e6},
        "sweep": {"rows": [{**swept, "cold": 2e-5, "captured": 1e-5, "host": 3e-5}, {**swept, "failed": "other bits"}]},
    }
    for name, value in texts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    page = " ".join(summary.markdown(tmp_path).split())
    assert "| opt-1.3b | 16 x SST-2 | meerkat, captured (not captured: why) | 12.50 | 1.00 | 3 GB |" in page
    assert "| first-order, AdamW | no numbers: too large | | |" in page
    assert "| m | 0.001 | 5 | perturb | 1 | 256 x 2 | 20.0 | 10.0 | 30.0 |" in page
    assert "| 256 x 2 | no numbers: other bits | | |" in page
    assert "| meerkat, captured, torch.compile | 12.50 |" in page
    assert "Captured and eager steps have the same scalars in 1 of 2 cases." in page
    assert "must move 86 MB; ncu counts: dram__bytes_read.sum Mbyte 43.1; gpu__time_duration.sum us 40" in page


def test_steps_with_a_compiled_forward_pass_call_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With an imitation of the compiler, which takes minutes on a CPU."""
    compiled: list[object] = []

    def imitation(loss: Callable[..., torch.Tensor], *, dynamic: bool) -> Callable[..., torch.Tensor]:
        assert not dynamic
        return lambda *inputs: compiled.append(loss) or loss(*inputs)  # type: ignore[func-returns-value]

    monkeypatch.setattr(torch, "compile", imitation)
    compiled_forward.measure(CPU, Record(tmp_path / "compiled.json"))
    (row,) = read(tmp_path / "compiled.json")["rows"]
    assert row["row"] == "meerkat, captured, torch.compile"
    assert row["seconds"] > 0
    assert len(compiled) == 2 * 6  # two forward passes in each step


def test_the_commit_is_unknown_without_git_and_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    def not_installed(_: str) -> str:
        raise origin.PackageNotFoundError

    monkeypatch.setattr(origin.subprocess, "run", missing)
    assert origin.commit().startswith("unknown (version ")
    monkeypatch.setattr(origin, "version", not_installed)
    assert origin.commit() == "unknown"


def test_make_gpu_runs_the_program_with_nothing_installed() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "PYTHONPATH=$(CURDIR)/.types $(PYTHON) -m meerkat_engine.bench.gpu --output $(OUTPUT)" in text
    assert "\nOUTPUT ?= gpu-results\n" in text


def test_a_part_names_its_file(tmp_path: Path) -> None:
    def measure(device: torch.device, record: Record) -> None:
        """Measures."""
        record["device"] = device.type
        record.append("rows", 1)

    command = part(measure)
    assert command.help == "Measures."
    done = CliRunner().invoke(command, ["--device", "cpu", "--output", str(tmp_path / "p.json")])
    assert done.exit_code == 0, done.output
    assert read(tmp_path / "p.json") == {"device": "cpu", "rows": [1]}
    assert pipeline.measure.__doc__


def test_a_captured_time_is_that_of_one_launch_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an imitation of CUDA's graphs and events, for the lack of a GPU."""
    events: list[str] = []
    graph = SimpleNamespace(replay=lambda: events.append("replay"))
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda _: 40.0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    assert sweep._captured(lambda: events.append("launch"), 20) == pytest.approx(0.002)
    assert events == ["launch"] * 20 + ["replay"] * 5


def test_captured_steps_are_counted_and_replayed_from_their_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With an imitation of CUDA's graphs."""

    def make(*arguments: Any, capture: str, **settings: Any) -> SparseZO:
        optimizer = SparseZO(*arguments, capture=capture, backend="torch", **settings)
        if capture == "auto":
            ImitatedGraphs(optimizer)
        return optimizer

    all_rows = steps.rows
    monkeypatch.setattr(steps, "SparseZO", make)
    monkeypatch.setattr(steps, "rows", lambda case: itertools.islice(all_rows(case), 2))
    steps.measure(CPU, Record(tmp_path / "steps.json"))
    captured, eager = read(tmp_path / "steps.json")["rows"]
    assert captured["captured_steps"] >= 4
    assert captured["not_captured"] is None
    assert eager["captured_steps"] == 0
    assert captured["scalars"] == eager["scalars"]
    assert len(set(captured["scalars"])) == 4
