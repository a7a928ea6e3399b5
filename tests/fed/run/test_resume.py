"""A run that was stopped anywhere resumes to the same bits; whatever does not fit is an error and changes nothing."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from meerkat_engine import SparseMask
from meerkat_engine.engine.errors import LedgerError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.fed.ledger.file import read_ledger
from meerkat_engine.fed.ledger.snapshot import Snapshot
from meerkat_engine.fed.run.directory import RunDirectory, read_origin

from helpers.command import call
from helpers.killing import contents

SETTINGS = ("--rounds", "6", "--local-steps", "2", "--calibration-texts", "32", "--eval-examples", "60",
            "--eval-every", "2", "--snapshot-every", "2", "--clients-per-round", "3")  # fmt: skip
FILES = {"ledger.jsonl", "metrics.jsonl", "gradip.jsonl"}

KILLED = {
    "between and inside writes": ("write", "method=meerkat", "rounds=4", "queries=2", "schedule=cosine",
                                  "clients_per_round=3", "eval_every=2", "snapshot_every=2"),
    "at any time": ("time", "method=meerkat", "rounds=40", "eval_every=2", "snapshot_every=3"),
    "with early stopping": ("write", "method=meerkat-vp", "partition=mixed", "rounds=3", "vp_steps=12", "vp_initial=4",
                            "vp_later=6", "snapshot_every=2"),
    "private": ("write", "method=decomfl", "dp_noise=2", "rounds=3", "snapshot_every=2"),
    "backpropagation": ("write", "method=fedavg", "rounds=3"),
}  # fmt: skip
NOT_SLOW = {"between and inside writes"}  # the others run with -m slow


def kill(directory: Path, kind: str, kills: int, seed: int, settings: tuple[str, ...]) -> dict[str, Any]:
    """Runs ``helpers.killing`` in another process and returns its report; see there for the arguments."""
    process = subprocess.run(
        [sys.executable, "-m", "helpers.killing", str(directory), kind, str(kills), str(seed),
         "local_steps=2", "eval_examples=60", "calibration_texts=32", *settings],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in NOT_SLOW)) for name in KILLED]
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, name: str) -> None:
    kind, *settings = KILLED[name]
    kills = 3 if name == "private" else 4  # at least 19 in total
    result = kill(tmp_path, kind, kills, 5, tuple(settings))
    assert result["kills"] >= kills
    assert len(set(result["ledger_lines_at_kill"])) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KILLED)
def test_many_killed_runs_resume_to_the_same_bits(tmp_path: Path, name: str) -> None:
    kind, *settings = KILLED[name]
    kills = {"private": 30, "backpropagation": 50}.get(name, 100)
    result = kill(tmp_path, kind, kills, 7, tuple(settings))
    print(name, result)
    assert result["kills"] >= kills


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("resume") / "run"
    result = call("run", *SETTINGS, "--output", path)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The same run, stopped when four rounds were in the ledger and three in the metrics."""
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    truncate(path / "ledger.jsonl", 5)
    truncate(path / "metrics.jsonl", 4)
    truncate(path / "gradip.jsonl", 4)
    ledger = read_ledger(path / "ledger.jsonl")
    masters = Snapshot.load(finished / "snapshot.safetensors", read_ledger(finished / "ledger.jsonl")).masters
    assert len(masters) == ledger.header.terms.elements
    (path / "snapshot.safetensors").unlink()
    return path


def truncate(path: Path, lines: int, torn: bytes = b"") -> None:
    """Leaves the first lines of a file, and adds an incomplete line."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:lines]) + torn)


def all_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_stopped_run_resumes_to_the_same_files(stopped: Path, finished: Path) -> None:
    result = call("run", "--resume", stopped)
    assert result.exit_code == 0, result.output
    assert "resuming after round 3" in result.output
    assert "choosing the mask" not in result.output
    assert contents(stopped) == contents(finished)
    assert "the same bits as at the end of the run" in call("replay", stopped).output


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: truncate(path / "metrics.jsonl", 1),
        lambda path: (path / "metrics.jsonl").unlink(),
        lambda path: truncate(path / "metrics.jsonl", 3, b'{"round": 3, "lo'),
        lambda path: truncate(path / "gradip.jsonl", 3, b'{"round":4,"clients":{"0":{"gr'),
        lambda path: truncate(path / "gradip.jsonl", 1),
        lambda path: (path / "gradip.jsonl").unlink(),
        lambda path: [truncate(path / name, 1 - (name == "gradip.jsonl")) for name in FILES],
        lambda path: [(path / name).unlink() for name in FILES],
        lambda path: [(path / name).unlink() for name in FILES | {"mask.safetensors", "origin.json"}],
        lambda path: (path / ".mask.safetensors.123.partial").write_bytes(b"half"),
    ],
    ids=["metrics lag", "no metrics", "torn metrics", "torn gradip", "gradip lags", "no gradip", "headers only",
         "no rounds", "settings only", "a partial file"],
)  # fmt: skip
def test_missing_and_incomplete_files_are_written_again(
    stopped: Path, finished: Path, damage: Callable[[Path], object]
) -> None:
    damage(stopped)
    result = call("run", "--resume", stopped)
    assert result.exit_code == 0, result.output
    assert contents(stopped) == contents(finished)


def test_a_torn_ledger_line_is_dropped_and_its_round_computed_again(stopped: Path, finished: Path) -> None:
    truncate(stopped / "ledger.jsonl", 4, b'{"round":4,"lr":[0.01')
    truncate(stopped / "gradip.jsonl", 3)
    with pytest.warns(UserWarning, match="dropped the torn last line 5"):
        result = call("run", "--resume", stopped)
    assert result.exit_code == 0, result.output
    assert contents(stopped) == contents(finished)


def test_a_snapshot_makes_replay_unnecessary_and_changes_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)  # as if killed before the summary; the snapshot is of round 6
    truncate(path / "metrics.jsonl", 7)
    applied = []
    from meerkat_engine.fed.replica import Replica

    original = Replica.apply_rounds
    monkeypatch.setattr(
        Replica, "apply_rounds", lambda self, rows: (applied.append(len(rows)), original(self, rows))[1]
    )
    result = call("run", "--resume", path)
    assert result.exit_code == 0, result.output
    assert applied == []
    assert contents(path) == contents(finished)


def test_a_finished_run_is_not_changed(finished: Path) -> None:
    before = all_files(finished)
    result = call("run", "--resume", finished)
    assert result.exit_code == 0
    assert "this run is finished" in result.output
    assert "accuracy " in result.output
    assert all_files(finished) == before


def test_damaged_files_of_a_finished_run_are_named(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    text = (path / "config.toml").read_text()
    (path / "config.toml").write_text(text.replace("lr = 0.01", "lr = 0.02"))
    check_resume_fails(path, "config.toml has changed since the run started")
    (path / "config.toml").write_text(text)
    SparseMask.random(embedded.load().model, 0.01, 5).save(path / "other.safetensors")
    (path / "other.safetensors").replace(path / "mask.safetensors")
    check_resume_fails(
        path, "mask.safetensors is not the mask that the ledger names; put the right one back, or delete it"
    )
    shutil.copy(finished / "mask.safetensors", path)
    check_resume_fails_after_damage(path / "origin.json", b'"threads"', b'"threadz"', "origin.json is damaged")
    check_resume_fails_after_damage(path / "gradip.jsonl", b'"norm"', b'"form"', "; delete the file, and")
    (path / "ledger.jsonl").write_bytes((finished / "ledger.jsonl").read_bytes().replace(b"lr", b"lt", 1))
    check_resume_fails(path, "ledger.jsonl, line 1: the checksum does not match")


def check_resume_fails_after_damage(file: Path, old: bytes, new: bytes, message: str) -> None:
    """Replaces the first ``old`` in a file, expects an error, and restores the file."""
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    check_resume_fails(file.parent, message)
    file.write_bytes(data)


@pytest.mark.parametrize("lost", [("mask.safetensors",), ("gradip.jsonl",), ("mask.safetensors", "gradip.jsonl")])
def test_files_that_a_finished_run_lost_are_written_again(
    finished: Path, tmp_path: Path, lost: tuple[str, ...]
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    for name in lost:
        (path / name).unlink()
    if "mask.safetensors" in lost:
        result = call("replay", path)
        assert result.exit_code == 1
        assert "mask.safetensors is missing; put it back, or make it again with" in result.output.replace("\n", " ")
    metrics = (path / "metrics.jsonl").read_bytes()
    result = call("run", "--resume", path)
    assert result.exit_code == 0, result.output
    assert f"lost files were written again: {', '.join(lost)}" in result.output
    assert contents(path) == contents(finished)
    assert (path / "metrics.jsonl").read_bytes() == metrics
    assert "the same bits as at the end of the run" in call("replay", path).output


def test_a_lost_mask_that_the_settings_no_longer_give_is_an_error(
    finished: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine where calibration has other last bits."""
    texts = embedded.calibration_texts(4)
    monkeypatch.setattr(embedded, "calibration_texts", lambda count: texts)
    path = tmp_path / "finished"
    shutil.copytree(finished, path)
    for run in (path, stopped):
        (run / "mask.safetensors").unlink()
        check_resume_fails(run, "mask.safetensors is missing, and the mask that the settings give here is")


def test_resume_with_settings_starts_a_run_or_resumes_it(tmp_path: Path, finished: Path) -> None:
    """So a job can use the same command for all attempts."""
    for _ in range(2):
        result = call("run", *SETTINGS, "--resume", tmp_path / "job")
        assert result.exit_code == 0, result.output
    assert contents(tmp_path / "job") == contents(finished)


def check_resume_fails(path: Path, message: str, *options: str) -> None:
    """Resumes a run, expects an error with a message, and checks that no file changes."""
    before = all_files(path) if path.is_dir() else None
    result = call("run", "--resume", path, *options)
    assert result.exit_code == 1, result.output
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    after = all_files(path) if path.is_dir() else None
    assert after == before


def test_resume_needs_a_run(tmp_path: Path) -> None:
    check_resume_fails(tmp_path / "none", "holds no run to resume (no config.toml)")


def test_resume_with_other_settings_fails(stopped: Path) -> None:
    message = "has lr 0.01, 0.5 was given; a run keeps the settings that it started with, so leave lr out"
    check_resume_fails(stopped, message, "--lr", "0.5")
    text = (stopped / "config.toml").read_text()
    (stopped / "config.toml").write_text(text.replace("seed = 0", "seed = 1"))
    check_resume_fails(stopped, "config.toml has changed since the run started")
    (stopped / "config.toml").write_text(text.replace("batch_size = 16", "batch_size = 8", 1))
    check_resume_fails(stopped, "config.toml has changed since the run started")
    (stopped / "config.toml").write_bytes(text.encode() + b"\xff")
    check_resume_fails(stopped, "cannot read the settings in")


def test_output_and_resume_exclude_each_other(stopped: Path) -> None:
    check_resume_fails(stopped, "leave --output out", "--output", "elsewhere")


COMPARED = (*SETTINGS, "--rounds", "2", "--compare-random")


def accuracies(result: Any) -> str:
    """The last line of a comparison with a random mask."""
    assert result.exit_code == 0, result.output
    line: str = result.output.splitlines()[-1]
    assert line.startswith("accuracy after")
    return line


def test_a_comparison_with_a_random_mask_resumes_in_one_command(tmp_path: Path) -> None:
    whole, job = tmp_path / "whole", tmp_path / "job"
    expected = accuracies(call("run", *COMPARED, "--output", whole))
    for stop in ("before the first run ended", "before the second began", "before the second ended", "never"):
        if stop == "before the first run ended":
            shutil.copytree(whole, job)
            shutil.rmtree(job / "random-mask")
            truncate(job / "metrics.jsonl", 2)
        elif stop == "before the second began":
            shutil.rmtree(job / "random-mask")
        elif stop == "before the second ended":
            truncate(job / "random-mask" / "metrics.jsonl", 1)
        result = call("run", "--resume", job, "--compare-random")
        assert accuracies(result) == expected, stop
        for name in (".", "random-mask"):
            assert contents(job / name) == contents(whole / name), (stop, name)


def test_a_random_run_with_other_settings_is_not_resumed(tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert call("run", *COMPARED[:-1], "--output", job).exit_code == 0
    other = call("run", *COMPARED[:-1], "--method", "random-mask", "--seed", "9", "--output", job / "random-mask")
    assert other.exit_code == 0, other.output
    result = call("run", "--resume", job, "--compare-random")
    assert result.exit_code == 1
    assert "random-mask holds a run with other settings; move it away" in result.output


def test_ctrl_c_shows_the_command_that_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, path = RunDirectory.add_metrics, tmp_path / "my run"

    def add_metrics(directory: RunDirectory, line: dict[str, Any]) -> None:
        original(directory, line)
        if line.get("round") == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "add_metrics", add_metrics)
        result = call("run", *COMPARED, "--output", path)
    assert result.exit_code == 1
    assert f"stopped; to continue: meerkat-engine run --resume '{path}' --compare-random\n" in result.output
    assert "accuracy after" in call("run", "--resume", path, "--compare-random").output


def test_another_mask_is_rejected(stopped: Path) -> None:
    (stopped / "mask.safetensors").unlink()
    SparseMask.random(embedded.load().model, 0.01, 5).save(stopped / "mask.safetensors")
    check_resume_fails(stopped, "ledger.jsonl, line 1: the run uses the mask")


def test_another_base_model_is_rejected(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = embedded.load

    def changed(*arguments: Any, **options: Any) -> Any:
        lm = original(*arguments, **options)
        next(lm.model.parameters()).data[0] += 1
        return lm

    monkeypatch.setattr(embedded, "load", changed)
    check_resume_fails(stopped, "ledger.jsonl, line 1: the run started from a base model with fingerprint")


def test_other_examples_are_rejected(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = embedded.rows
    monkeypatch.setattr(embedded, "rows", lambda split, task: original(split, task)[::-1])
    check_resume_fails(stopped, "the examples, or their partition among the clients, have changed since the run")


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("ledger.jsonl", 700, "ledger.jsonl, line 2: the checksum does not match"),
        ("metrics.jsonl", 0, "metrics.jsonl, line 1: not JSON"),
        ("origin.json", 0, "origin.json is damaged"),
        (
            "origin.json",
            15,
            "origin.json is damaged (its checksum does not match); put a copy back, or start a new run",
        ),
        ("gradip.jsonl", 60, "gradip.jsonl, line 1: the checksum does not match"),
        ("mask.safetensors", -9, "mask.safetensors"),
    ],
)
def test_a_damaged_file_is_named(stopped: Path, name: str, at: int, message: str) -> None:
    data = bytearray((stopped / name).read_bytes())
    data[at] ^= 64
    (stopped / name).write_bytes(data)
    check_resume_fails(stopped, message)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("metrics.jsonl", '"bytes_up": 144', '"bytes_up": 145', "line 2: bytes_up is 145, in the ledger it is 144"),
        ("metrics.jsonl", '"accuracy"', '"accuracx"',
         "metrics.jsonl, line 1: accuracy, macro_f1 or validation_loss is not a number"),
        ("metrics.jsonl", '"seconds"', '"secondx"', "metrics.jsonl, line 1: seconds is None, not a number"),
        ("gradip.jsonl", '"round"', '"sound"', "gradip.jsonl, line 1: the checksum does not match"),
    ],
)  # fmt: skip
def test_values_that_disagree_with_the_ledger_are_named(
    stopped: Path, name: str, old: str, new: str, message: str
) -> None:
    text = (stopped / name).read_text()
    assert old in text
    (stopped / name).write_text(text.replace(old, new, 1))
    check_resume_fails(stopped, message)


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (lambda path: truncate(path / "ledger.jsonl", 3), "it has lost rounds"),
        (lambda path: truncate(path / "ledger.jsonl", 0), "has rounds but no ledger.jsonl, so it was lost"),
        (lambda path: (path / "ledger.jsonl").unlink(), "has rounds but no ledger.jsonl, so it was lost"),
        (lambda path: (path / "origin.json").unlink(), "has a ledger, but origin.json is missing"),
    ],
    ids=["last rounds", "emptied", "ledger", "origin"],
)
def test_lost_files_are_an_error(stopped: Path, lose: Callable[[Path], object], message: str) -> None:
    lose(stopped)
    check_resume_fails(stopped, message)


def test_partial_files_of_other_programs_are_not_deleted(stopped: Path, tmp_path: Path) -> None:
    (stopped / ".thesis.partial").write_bytes(b"mine")
    (stopped / ".export.1.partial").mkdir()
    assert call("run", "--resume", stopped).exit_code == 0
    assert (stopped / ".thesis.partial").read_bytes() == b"mine"
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / ".thesis.partial").write_bytes(b"mine")
    assert "already holds files" in call("run", *SETTINGS, "--output", tmp_path / "n").output


def test_resume_accepts_a_density_that_the_mask_file_overrides(finished: Path, tmp_path: Path) -> None:
    job = ("run", *SETTINGS, "--rounds", "1", "--mask", finished / "mask.safetensors", "--density", "0.5")
    for _ in range(2):
        assert call(*job, "--resume", tmp_path / "job").exit_code == 0


def test_a_missing_metrics_line_is_named(stopped: Path) -> None:
    lines = (stopped / "metrics.jsonl").read_bytes().splitlines(True)
    (stopped / "metrics.jsonl").write_bytes(lines[0] + lines[2])
    check_resume_fails(stopped, "metrics.jsonl, line 2: expected round 1")


def test_a_damaged_snapshot_is_detected(finished: Path, tmp_path: Path) -> None:
    """A flipped bit in any byte is an error, or does not change the snapshot that is read."""
    ledger, path = read_ledger(finished / "ledger.jsonl"), tmp_path / "snapshot.safetensors"
    data = (finished / "snapshot.safetensors").read_bytes()
    expected = Snapshot.load(finished / "snapshot.safetensors", ledger)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with suppress(LedgerError):
            loaded = Snapshot.load(path, ledger)
            assert (loaded.round, loaded.crc) == (expected.round, expected.crc)
            assert torch.equal(loaded.masters, expected.masters)


def test_a_snapshot_ahead_of_the_ledger_is_rejected(finished: Path, stopped: Path) -> None:
    shutil.copy(finished / "snapshot.safetensors", stopped)
    check_resume_fails(stopped, "either this is another run's snapshot, or the ledger has lost rounds")


def test_only_one_process_can_write(stopped: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time\nfrom pathlib import Path\n"
         "from meerkat_engine.fed.run.directory import RunDirectory\n"
         "with RunDirectory(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)", str(stopped)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        check_resume_fails(stopped, "another process is writing to")
        holder.kill()
    assert call("run", "--resume", stopped).exit_code == 0  # a killed process does not keep the lock


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that any user of the machine may read."""
    path = Path("/tmp") / f"meerkat-public-{os.getpid()}"
    path.mkdir(mode=0o755)
    yield path
    subprocess.run(["chmod", "-R", "u+w", str(path)], check=True)
    shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user without permissions")
def test_a_directory_without_write_permission_is_named(stopped: Path, public: Path) -> None:
    path = public / "run"
    shutil.copytree(stopped, path)
    (path / ".lock").unlink()
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom meerkat_engine.fed.run.directory import RunDirectory\n"
        "from meerkat_engine.engine.errors import RunError\nos.setuid(65534)\n"
        "try:\n    RunDirectory(Path(sys.argv[1]))\nexcept RunError as error:\n    print(error)\n"
    )
    path.chmod(0o555)
    for target in (path, path / "new"):
        done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
        assert done.stdout == f"cannot write to the run directory {target}: Permission denied\n"


def test_another_number_of_threads_is_logged(stopped: Path) -> None:
    origin, mask = read_origin(stopped), SparseMask.load(stopped / "mask.safetensors")
    assert origin is not None
    (stopped / "origin.json").unlink()
    with RunDirectory(stopped) as directory:
        directory.write_mask_and_origin(mask, dataclasses.replace(origin, threads=77))
    result = call("run", "--resume", stopped)
    assert result.exit_code == 0
    assert "the run started with threads 77, now" in result.output


def test_a_directory_with_only_a_lock_counts_as_empty(tmp_path: Path) -> None:
    """As after a process that was killed before it had written anything."""
    with RunDirectory(tmp_path / "r"):
        (tmp_path / "r" / ".config.toml.9.partial").write_bytes(b"ha")
    result = call("run", *SETTINGS, "--rounds", "1", "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the names of synced files in /proc")
def test_files_are_synced_in_the_documented_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records the calls of fsync and compares them with the order of writing in docs/formats.md."""
    synced: list[str] = []
    original = os.fsync

    def record_fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".partial")[0].rsplit(".", 1)[0])
        original(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    settings = [*SETTINGS, "--rounds", "2", "--snapshot-every", "2"]
    assert call("run", *settings, "--output", tmp_path / "r").exit_code == 0
    files = [name.removeprefix(".").split(".")[0] for name in synced if name != "r"]
    first, last = ["ledger", "gradip", "metrics"], ["ledger", "gradip", "metrics", "snapshot", "metrics"]
    assert files == ["config", "mask", "origin", "ledger", "metrics", *first, *last]
    assert synced.count("r") == len(set(files))  # the directory is synced once for each new file
