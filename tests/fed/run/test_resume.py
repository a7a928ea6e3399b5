"""A run that is stopped anywhere goes on to the same bits; what does not fit is refused and nothing is changed."""

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
from meerkat_engine.fed.run.directory import RunDirectory

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
    "in private": ("write", "method=decomfl", "dp_noise=2", "rounds=3", "snapshot_every=2"),
    "by backpropagation": ("write", "method=fedavg", "rounds=3"),
}  # fmt: skip
OFTEN = {"between and inside writes"}  # killed in every run of the suite


def kill(directory: Path, kind: str, kills: int, seed: int, settings: tuple[str, ...]) -> dict[str, Any]:
    """Runs ``killing`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.killing", str(directory), kind, str(kills), str(seed),
         "local_steps=2", "eval_examples=60", "calibration_texts=32", *settings],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] * (each not in OFTEN)) for each in KILLED]
)
def test_a_run_that_is_killed_ends_on_the_same_bits(tmp_path: Path, name: str) -> None:
    kind, *settings = KILLED[name]
    wanted = 3 if name == "in private" else 4  # 19 and more in all
    found = kill(tmp_path, kind, wanted, 5, tuple(settings))
    assert found["kills"] >= wanted
    assert len(set(found["ledger_lines_at_kill"])) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KILLED)
def test_many_runs_that_are_killed_end_on_the_same_bits(tmp_path: Path, name: str) -> None:
    kind, *settings = KILLED[name]
    wanted = {"in private": 30, "by backpropagation": 50}.get(name, 100)
    found = kill(tmp_path, kind, wanted, 7, tuple(settings))
    print(name, found)
    assert found["kills"] >= wanted


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("resume") / "run"
    result = call("run", *SETTINGS, "--output", path)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The same run, stopped after its fourth round had been written to the ledger: three are in the metrics."""
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    cut(path / "ledger.jsonl", 5)
    cut(path / "metrics.jsonl", 4)
    cut(path / "gradip.jsonl", 4)
    ledger = read_ledger(path / "ledger.jsonl")
    masters = Snapshot.load(whole / "snapshot.safetensors", read_ledger(whole / "ledger.jsonl")).masters
    assert len(masters) == ledger.header.terms.elements
    (path / "snapshot.safetensors").unlink()
    return path


def cut(path: Path, lines: int, torn: bytes = b"") -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:lines]) + torn)


def everything(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def test_what_was_stopped_goes_on(stopped: Path, whole: Path) -> None:
    result = call("run", "--resume", stopped)
    assert result.exit_code == 0, result.output
    assert "going on after round 3" in result.output
    assert "choosing the mask" not in result.output
    assert contents(stopped) == contents(whole)
    assert "the same bits as at the end of the run" in call("replay", stopped).output


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: cut(path / "metrics.jsonl", 1),
        lambda path: (path / "metrics.jsonl").unlink(),
        lambda path: cut(path / "metrics.jsonl", 3, b'{"round": 3, "lo'),
        lambda path: cut(path / "gradip.jsonl", 3, b'{"round": 4, "clients": {"0": {"gr'),
        lambda path: [cut(path / name, 1 - (name == "gradip.jsonl")) for name in FILES],
        lambda path: [(path / name).unlink() for name in FILES],
        lambda path: [(path / name).unlink() for name in FILES | {"mask.safetensors", "origin.json"}],
        lambda path: (path / ".mask.safetensors.123.partial").write_bytes(b"half"),
    ],
    ids=["metrics lag", "no metrics", "torn metrics", "torn gradip", "no round", "no round at all",
         "settings only", "a partial file"],
)  # fmt: skip
def test_whatever_is_missing_is_made_anew(stopped: Path, whole: Path, damage: Callable[[Path], object]) -> None:
    damage(stopped)
    result = call("run", "--resume", stopped)
    assert result.exit_code == 0, result.output
    assert contents(stopped) == contents(whole)


def test_a_torn_ledger_line_is_dropped_and_the_round_taken_again(stopped: Path, whole: Path) -> None:
    cut(stopped / "ledger.jsonl", 4, b'{"round":4,"lr":[0.01')
    cut(stopped / "gradip.jsonl", 3)
    with pytest.warns(UserWarning, match="dropped the torn last line 5"):
        result = call("run", "--resume", stopped)
    assert result.exit_code == 0, result.output
    assert contents(stopped) == contents(whole)


def test_a_snapshot_saves_the_replay_and_changes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole, path)  # killed before the summary; the snapshot is of round 6
    cut(path / "metrics.jsonl", 7)
    applied = []
    from meerkat_engine.fed.replica import Replica

    plain = Replica.apply_rounds
    monkeypatch.setattr(Replica, "apply_rounds", lambda self, rows: (applied.append(len(rows)), plain(self, rows))[1])
    result = call("run", "--resume", path)
    assert result.exit_code == 0, result.output
    assert applied == []
    assert contents(path) == contents(whole)


def test_a_finished_run_is_left_alone(whole: Path) -> None:
    before = everything(whole)
    result = call("run", "--resume", whole)
    assert result.exit_code == 0
    assert "this run is finished" in result.output
    assert "accuracy " in result.output
    assert everything(whole) == before


def test_a_finished_run_that_is_not_whole_is_named(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    text = (path / "config.toml").read_text()
    (path / "config.toml").write_text(text.replace("lr = 0.01", "lr = 0.02"))
    refused(path, "config.toml is not what the run began with")
    (path / "config.toml").write_text(text)
    (path / "mask.safetensors").unlink()
    refused(path, "cannot read the mask")
    shutil.copy(whole / "mask.safetensors", path)
    (path / "ledger.jsonl").write_bytes((whole / "ledger.jsonl").read_bytes().replace(b"lr", b"lt", 1))
    refused(path, "ledger.jsonl, line 1: the checksum does not match")


def test_a_job_gives_the_same_command_each_time(tmp_path: Path, whole: Path) -> None:
    """With its settings, --resume begins the run where there is none yet."""
    for _ in range(2):
        result = call("run", *SETTINGS, "--resume", tmp_path / "job")
        assert result.exit_code == 0, result.output
    assert contents(tmp_path / "job") == contents(whole)


def refused(path: Path, message: str, *options: str) -> None:
    before = everything(path) if path.is_dir() else None
    result = call("run", "--resume", path, *options)
    assert result.exit_code == 1, result.output
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    after = everything(path) if path.is_dir() else None
    assert after == before


def test_there_must_be_a_run(tmp_path: Path) -> None:
    refused(tmp_path / "none", "holds no run to go on with (no config.toml)")


def test_the_settings_are_those_it_began_with(stopped: Path) -> None:
    refused(stopped, "has lr 0.01, 0.5 was given; a run goes on with its own settings", "--lr", "0.5")
    text = (stopped / "config.toml").read_text()
    (stopped / "config.toml").write_text(text.replace("seed = 0", "seed = 1"))
    refused(stopped, "config.toml is not what the run began with")
    (stopped / "config.toml").write_text(text.replace("batch_size = 16", "batch_size = 8", 1))
    refused(stopped, "config.toml is not what the run began with")
    (stopped / "config.toml").write_bytes(text.encode() + b"\xff")
    refused(stopped, "cannot read the settings in")


def test_output_and_resume_exclude_each_other(stopped: Path) -> None:
    refused(stopped, "leave --output and --compare-random out", "--output", "elsewhere")


def test_a_foreign_mask_is_refused(stopped: Path) -> None:
    (stopped / "mask.safetensors").unlink()
    SparseMask.random(embedded.load().model, 0.01, 5).save(stopped / "mask.safetensors")
    refused(stopped, "ledger.jsonl, line 1: the run uses the mask")


def test_another_base_model_is_refused(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = embedded.load

    def changed(*arguments: Any) -> Any:
        lm = plain(*arguments)
        next(lm.model.parameters()).data[0] += 1
        return lm

    monkeypatch.setattr(embedded, "load", changed)
    refused(stopped, "ledger.jsonl, line 1: the run began with a base model of fingerprint")


def test_other_examples_are_refused(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = embedded.rows
    monkeypatch.setattr(embedded, "rows", lambda split, task: plain(split, task)[::-1])
    refused(stopped, "the examples, or who has which, are not those that the run")


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("ledger.jsonl", 700, "ledger.jsonl, line 2: the checksum does not match"),
        ("metrics.jsonl", 0, "metrics.jsonl, line 1: no JSON"),
        ("origin.json", 0, "origin.json is damaged"),
        ("mask.safetensors", -9, "mask.safetensors"),
    ],
)
def test_damage_is_named_and_nothing_changed(stopped: Path, name: str, at: int, message: str) -> None:
    data = bytearray((stopped / name).read_bytes())
    data[at] ^= 64
    (stopped / name).write_bytes(data)
    refused(stopped, message)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("metrics.jsonl", '"bytes_up": 144', '"bytes_up": 145', "line 2: bytes_up is 145, by the ledger 144"),
        ("metrics.jsonl", '"accuracy"', '"accuracx"', "metrics.jsonl, line 1: an evaluation or a time is no number"),
        ("metrics.jsonl", '"seconds"', '"secondx"', "metrics.jsonl, line 1: an evaluation or a time is no number"),
        ("gradip.jsonl", '"round"', '"sound"', "gradip.jsonl, line 1: no round after the line before"),
    ],
)  # fmt: skip
def test_what_is_not_so_is_named(stopped: Path, name: str, old: str, new: str, message: str) -> None:
    text = (stopped / name).read_text()
    assert old in text
    (stopped / name).write_text(text.replace(old, new, 1))
    refused(stopped, message)


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (lambda path: cut(path / "ledger.jsonl", 3), "it has lost rounds"),
        (lambda path: cut(path / "ledger.jsonl", 0), "has rounds and no ledger.jsonl, which is lost"),
        (lambda path: (path / "ledger.jsonl").unlink(), "has rounds and no ledger.jsonl, which is lost"),
        (lambda path: (path / "origin.json").unlink(), "has a ledger and no origin.json"),
    ],
    ids=["last rounds", "emptied", "ledger", "origin"],
)
def test_what_was_lost_is_not_made_up(stopped: Path, lose: Callable[[Path], object], message: str) -> None:
    lose(stopped)
    refused(stopped, message)


def test_a_partial_file_of_someone_else_is_left_alone(stopped: Path, tmp_path: Path) -> None:
    (stopped / ".thesis.partial").write_bytes(b"mine")
    (stopped / ".export.1.partial").mkdir()
    assert call("run", "--resume", stopped).exit_code == 0
    assert (stopped / ".thesis.partial").read_bytes() == b"mine"
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / ".thesis.partial").write_bytes(b"mine")
    assert "already holds files" in call("run", *SETTINGS, "--output", tmp_path / "n").output


def test_a_job_that_names_a_mask_and_a_density_goes_on(whole: Path, tmp_path: Path) -> None:
    job = ("run", *SETTINGS, "--rounds", "1", "--mask", whole / "mask.safetensors", "--density", "0.5")
    for _ in range(2):
        assert call(*job, "--resume", tmp_path / "job").exit_code == 0


def test_a_missing_line_of_the_metrics_is_named(stopped: Path) -> None:
    lines = (stopped / "metrics.jsonl").read_bytes().splitlines(True)
    (stopped / "metrics.jsonl").write_bytes(lines[0] + lines[2])
    refused(stopped, "metrics.jsonl, line 2: expected round 1")


def test_a_damaged_snapshot_is_named(whole: Path, tmp_path: Path) -> None:
    """Every byte of it: an error, or the same snapshot."""
    ledger, path = read_ledger(whole / "ledger.jsonl"), tmp_path / "snapshot.safetensors"
    data = (whole / "snapshot.safetensors").read_bytes()
    expected = Snapshot.load(whole / "snapshot.safetensors", ledger)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with suppress(LedgerError):
            found = Snapshot.load(path, ledger)
            assert (found.round, found.seal) == (expected.round, expected.seal)
            assert torch.equal(found.masters, expected.masters)


def test_a_snapshot_ahead_of_the_ledger_is_refused(whole: Path, stopped: Path) -> None:
    shutil.copy(whole / "snapshot.safetensors", stopped)
    refused(stopped, "either this is another run's snapshot, or the ledger has lost rounds")


def test_one_process_at_a_time(stopped: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time\nfrom pathlib import Path\n"
         "from meerkat_engine.fed.run.directory import RunDirectory\n"
         "with RunDirectory(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)", str(stopped)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused(stopped, "another process is writing to")
        holder.kill()
    assert call("run", "--resume", stopped).exit_code == 0  # a killed process holds nothing


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that any user of the machine may enter."""
    path = Path("/tmp") / f"meerkat-public-{os.getpid()}"
    path.mkdir(mode=0o755)
    yield path
    subprocess.run(["chmod", "-R", "u+w", str(path)], check=True)
    shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user without rights")
def test_a_directory_that_may_not_be_written_is_named(stopped: Path, public: Path) -> None:
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


def test_other_threads_are_told(stopped: Path) -> None:
    origin = json.loads((stopped / "origin.json").read_text())
    (stopped / "origin.json").write_text(json.dumps(origin | {"threads": 77}))
    result = call("run", "--resume", stopped)
    assert result.exit_code == 0
    assert "the run began with threads 77, now" in result.output


def test_a_lock_is_no_run(tmp_path: Path) -> None:
    """Killed before anything had been written: the directory is as good as empty."""
    with RunDirectory(tmp_path / "r"):
        (tmp_path / "r" / ".config.toml.9.partial").write_bytes(b"ha")
    result = call("run", *SETTINGS, "--rounds", "1", "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks /proc which file is synced")
def test_everything_is_on_disk_before_what_follows_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of writing of docs/formats.md, by the calls of fsync."""
    synced: list[str] = []
    plain = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".partial")[0].rsplit(".", 1)[0])
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    settings = [*SETTINGS, "--rounds", "2", "--snapshot-every", "2"]
    assert call("run", *settings, "--output", tmp_path / "r").exit_code == 0
    files = [name.removeprefix(".").split(".")[0] for name in synced if name != "r"]
    first, last = ["ledger", "gradip", "metrics"], ["ledger", "gradip", "metrics", "snapshot", "metrics"]
    assert files == ["config", "mask", "origin", "ledger", "metrics", *first, *last]
    assert synced.count("r") == len(set(files))  # and the directory, with each new name
