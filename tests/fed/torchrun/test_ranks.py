"""``torchrun``: several processes give the bits of one, and a run that lost a process can be resumed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.fed.torchrun.ranks import torchrun_ranks

from helpers.command import call, metrics_of, summary_of
from helpers.models import make_model, make_tokenizer

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")

SMALL = ("--rounds", "3", "--local-steps", "3", "--eval-examples", "40", "--snapshot-every", "0")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, as in each process that torchrun starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(
    processes: int, *arguments: object, torchrun_options: tuple[str, ...] = (),
    program: tuple[str, ...] = ("-m", "meerkat_engine"), cwd: Path | None = None,
) -> subprocess.Popen[str]:  # fmt: skip
    """Starts ``meerkat-engine run`` under torchrun.

    Args:
        processes: number of processes.
        arguments: arguments of ``meerkat-engine run``.
        torchrun_options: options of torchrun.
        program: program that torchrun starts.
        cwd: working directory.
    """
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return subprocess.Popen(
        [*launcher, *torchrun_options, *program, "run", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=cwd,
    )  # fmt: skip


def torchrun(processes: int, *arguments: object, **named: object) -> str:
    """Runs ``start`` to the end and returns the output."""
    process = start(processes, *arguments, **named)  # type: ignore[arg-type]
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def same_results(one: Path, other: Path) -> bool:
    """Whether two runs wrote the same files, except for times and the number of processes."""

    def metrics_without_times(run: Path) -> list[dict[str, object]]:
        lines = metrics_of(run)
        for line in lines:
            for name in [name for name in line if name.startswith("seconds")]:
                del line[name]
        lines[-1]["summary"] = {
            name: value
            for name, value in lines[-1]["summary"].items()
            if not name.startswith("seconds") and name not in ("forward_share_of_step", "machine")
        }
        return lines

    names = [name for name in ("ledger.jsonl", "gradip.jsonl") if (one / name).exists()]
    same_files = all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    return same_files and metrics_without_times(one) == metrics_without_times(other)


RUNS = {
    "three that share one client": (3, ("--ranks-per-client", 3, "--micro-batch-size", 4, "--clients", 2)),
}  # fmt: skip
SLOW_RUNS = {
    "sampled clients, stopped early": (
        3,
        ("--method", "meerkat-vp", "--clients", 7, "--clients-per-round", 4, "--vp-steps", 6, "--vp-initial", 2,
         "--vp-later", 3, "--vp-rho-later", 0.8, "--vp-rho-quie", 0.1, "--vp-sigma", 10, "--partition", "iid"),
    ),
    "a client each": (2, ()),
    "weights": (2, ("--method", "fedavg", "--clients", 3, "--clients-per-round", 2)),
    "private, two that share one client": (
        2, ("--ranks-per-client", 2, "--micro-batch-size", 3, "--dp-noise", 1.0, "--partition", "iid"),
    ),
    "hostile": (2, ("--attack", "scale", "--attackers", 1, "--max-scalar", 1000, "--method", "lora-fedzo")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("processes", "settings"),
    [pytest.param(*run, id=name) for name, run in RUNS.items()]
    + [pytest.param(*run, id=name, marks=pytest.mark.slow) for name, run in SLOW_RUNS.items()],
)
def test_several_processes_give_the_bits_of_one(tmp_path: Path, processes: int, settings: tuple[object, ...]) -> None:
    one_process = list(settings)
    if "--ranks-per-client" in one_process:
        one_process.remove("--ranks-per-client")
        one_process.remove(processes)
    assert call("run", *SMALL, *one_process, "--output", tmp_path / "one").exit_code == 0
    output = torchrun(processes, *SMALL, *settings, "--output", tmp_path / "many")
    assert output.count("accuracy        ") == 1
    assert f"{processes} processes, " in output
    assert same_results(tmp_path / "one", tmp_path / "many")
    assert summary_of(tmp_path / "many")["machine"]["processes"] == processes
    assert "the same bits as at the end of the run" in call("replay", tmp_path / "many").output


def process_of(launcher: int, rank: int) -> int:
    """Id of the process of a rank, among the children of a launcher."""
    for _ in range(200):
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                parent = directory.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1]
                environment = directory.joinpath("environ").read_bytes().split(b"\0")
            except OSError:
                continue  # the process has ended
            if parent == str(launcher) and f"RANK={rank}".encode() in environment:
                return int(directory.name)
        time.sleep(0.1)
    raise AssertionError(f"no rank {rank}")


def kill_after(process: subprocess.Popen[str], rank: int, ledger: Path, lines: int) -> None:
    """Kills a rank as soon as the ledger has a number of lines."""
    victim = process_of(process.pid, rank)
    for _ in range(6000):
        if ledger.exists() and ledger.read_bytes().count(b"\n") >= lines:
            os.kill(victim, signal.SIGKILL)
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"the ledger did not get {lines} lines")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_run_that_lost_a_process_can_be_resumed(tmp_path: Path, rank: int) -> None:
    """Even with another number of processes."""
    settings = ("--rounds", 16, "--clients", 6, "--eval-examples", 40, "--snapshot-every", 3)
    run = tmp_path / "run"
    process = start(3, *settings, "--output", run)
    kill_after(process, rank, run / "ledger.jsonl", 4)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    if rank:
        assert "Error: rank 2 of this run was lost (" in output or "Error: this run received SIGTERM" in output
        assert "the rounds in the ledger are complete, and `run --resume` continues from there" in output
    assert f"rank      : {rank} " in output  # torchrun's own report
    assert (run / "ledger.jsonl").read_bytes().count(b"\n") < 17
    output = torchrun(2, "--resume", run)
    assert "resuming after round" in output
    assert call("run", *settings, "--output", tmp_path / "one").exit_code == 0
    assert same_results(tmp_path / "one", run)


@pytest.mark.slow
def test_torchrun_can_restart_a_run(tmp_path: Path) -> None:
    settings, run = ("--rounds", 16, "--eval-examples", 40), tmp_path / "run"
    process = start(2, *settings, "--resume", run, torchrun_options=("--max-restarts", "1"))
    kill_after(process, 1, run / "ledger.jsonl", 4)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resuming after round" in output
    assert call("run", *settings, "--output", tmp_path / "one").exit_code == 0
    assert same_results(tmp_path / "one", run)


def test_a_process_with_other_examples_is_an_error(tmp_path: Path) -> None:
    """Hosts may have different files. In this test, each rank works in its own directory."""
    make_model("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    make_tokenizer("it was good bad odd .").save_pretrained(tmp_path / "model")
    rows = [f'{{"text": "it was {("bad", "good")[i % 2]}", "label": {i % 2}}}' for i in range(40)]
    for rank, last in enumerate(([], ['{"text": "it was odd", "label": 0}'])):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "own.jsonl").write_text("\n".join(rows + last))
    launch = tmp_path / "launch.py"
    launch.write_text("import os\nos.chdir(os.environ['RANK'])\nfrom meerkat_engine.cli import main\nmain()\n")
    own = ("--model", tmp_path / "model", "--data", "own.jsonl", "--template", "{text} .", "--labels", "bad,good",
           "--method", "random-mask", "--density", 0.05, "--partition", "iid")  # fmt: skip
    process = start(2, *SMALL, *own, "--clients", 2, "--batch-size", 4, "--output", tmp_path / "run",
                    program=(str(launch),), cwd=tmp_path)  # fmt: skip
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Error: the examples on rank 1 (" in output
    assert not (tmp_path / "run").exists()


def test_ranks_per_client_must_divide_the_number_of_processes() -> None:
    with pytest.raises(ConfigError, match="2 ranks per client do not divide the 1 processes"), torchrun_ranks(2):
        pass
    assert "3 ranks per client do not divide" in call("run", "--ranks-per-client", 3).output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(("--method", "fedavg"), "fedavg trains by backpropagation", marks=pytest.mark.slow),
        ((), "give their size with --micro-batch-size"),
    ],
)
def test_settings_that_do_not_let_ranks_share_a_client(tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    process = start(2, *settings, "--ranks-per-client", 2, "--output", tmp_path / "run")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert message in output
    assert not (tmp_path / "run").exists()


def test_ranks_with_another_number_of_threads_are_refused(tmp_path: Path) -> None:
    """A client's bits would depend on the process that computes it."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, runpy, sys, torch\ntorch.set_num_threads(1 + int(os.environ['RANK']))\n"
        "runpy.run_module('meerkat_engine', run_name='__main__', alter_sys=True)\n"
    )
    process = start(2, *SMALL, "--output", tmp_path / "r", program=(str(program),))
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "rank 1 runs meerkat-engine " in output
    assert "set OMP_NUM_THREADS to the same number" in output
    assert not (tmp_path / "r").exists()
