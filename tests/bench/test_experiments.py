"""Tests of ``meerkat-engine experiment``: each experiment runs, reports its result, and repeats no finished run."""

import math
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from meerkat_engine import SparseMask
from meerkat_engine.bench.experiments import local_steps
from meerkat_engine.bench.experiments.command import EXPERIMENTS
from meerkat_engine.bench.experiments.experiment import Results
from meerkat_engine.bench.experiments.finished import FinishedRun
from meerkat_engine.bench.experiments.selection import Selection
from meerkat_engine.bench.tables import over_seeds
from meerkat_engine.cli import main
from meerkat_engine.engine import stream
from meerkat_engine.fed import execute, make_config, read_ledger
from meerkat_engine.fed.ledger.file import RoundRecord

TINY = ("--rounds", "1", "--local-steps", "1", "--eval-examples", "40", "--calibration-texts", "16", "--vp-steps", "8",
        "--vp-initial", "3", "--vp-later", "4", "--vp-null-paths", "3", "--clients", "4", "--batch-size", "8",
        "--eval-every", "1")  # fmt: skip


def run_experiment(name: str, output: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["experiment", name, *TINY, *options, "--output", str(output)])


@pytest.fixture(scope="module")
def sparsity(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output: Path = tmp_path_factory.mktemp("experiments") / "sparsity"
    return output, run_experiment("sparsity", output, "--seeds", "2")


EXPECTED = {
    "attacks": "trimmed-mean | sign-flip",
    "corrections": "embedded-topic | T = 10, repeated seeds",
    "gradip": "gradient norm    | single label",
    "selection": "embedded-topic | mixed | random-stop, share",
    "local-steps": "Dirichlet 0.1 | T = 10 | 1 ",
    "mask-source": "embedded-topic | the task trained on",
    "concentration": "the top 1.00% of the elements hold",
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_experiment_writes_a_table_and_a_figure(name: str, tmp_path: Path) -> None:
    ten_steps = ["--local-steps", "10"]
    attackers = ["--clients", "5", "--attackers", "1"]
    options = {
        "local-steps": ten_steps,
        "corrections": [*ten_steps, "--tasks", "embedded-topic"],
        "attacks": attackers,
    }.get(name, [])
    result = run_experiment(name, tmp_path / "e", "--seeds", "1", *options)
    assert result.exit_code == 0, result.output
    table = (tmp_path / "e" / "result.md").read_text()
    assert table.strip() in result.output
    cells = EXPECTED[name].split(" | ")
    assert any(all(cell.strip() in line for cell in cells) for line in table.splitlines()), table
    widths = {line.count("|") for line in table.split("\n\n")[1].splitlines()}
    assert len(widths) == 1  # all lines have the same number of cells
    assert (tmp_path / "e" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_all_experiments_are_tested() -> None:
    assert {*EXPECTED, "sparsity", "fewer-forwards", "paper"} == set(EXPERIMENTS)


def test_every_arm_and_seed_has_a_run_directory(sparsity: tuple[Path, Result]) -> None:
    output, result = sparsity
    assert result.exit_code == 0, result.output
    directories = sorted(str(p.relative_to(output / "runs")) for p in output.glob("runs/*/*"))
    assert len(directories) == 2 * 4 * 2
    assert "iid-u-0.001/seed-0" in directories
    assert "dirichlet-0.5-u-1e-05/seed-1" in directories
    assert re.search(r"iid, u = 0\.01 +\| 838 ", result.output)
    assert len(list((output / "masks").iterdir())) == 4  # one per density, shared by partitions and seeds


def test_finished_runs_are_not_repeated(sparsity: tuple[Path, Result]) -> None:
    output, first = sparsity
    interrupted = output / "runs" / "iid-u-0.001" / "seed-1"
    metrics = output / "runs" / "iid-u-0.001" / "seed-0" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    shutil.move(interrupted, interrupted.with_name("seed-1.unfinished"))  # as if the experiment was interrupted here
    (output / "records" / "iid-u-0.001" / "seed-1.json").unlink()
    again = run_experiment("sparsity", output, "--seeds", "2")
    assert again.exit_code == 0, again.output
    assert [line for line in again.output.splitlines() if "seed" in line] == ["sparsity: iid, u = 0.001, seed 1"]
    assert metrics.stat().st_mtime_ns == before
    assert sorted(p.name for p in interrupted.parent.iterdir()) == ["seed-0", "seed-1"]
    assert again.output.split("**")[-1].split("wrote")[0] == first.output.split("**")[-1].split("wrote")[0]


def test_a_directory_with_other_settings_or_files_is_rejected(sparsity: tuple[Path, Result], tmp_path: Path) -> None:
    output, _ = sparsity
    result = run_experiment("sparsity", output, "--lr", "0.5")
    assert result.exit_code == 1
    assert "holds an experiment with other settings" in result.output
    (tmp_path / "notes.txt").write_text("notes")
    result = run_experiment("gradip", tmp_path)
    assert result.exit_code == 1
    assert "holds other files; choose another --output (nothing was changed)" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sparsity", ["--mask", "m"], "the experiment sparsity sets mask itself"),
        ("mask-source", ["--mask", "m"], "the experiment mask-source sets mask itself"),
        ("gradip", ["--method", "meerkat"], "the experiment gradip sets method itself"),
        ("selection", ["--method", "meerkat"], "the experiment selection sets method itself"),
        (
            "local-steps",
            ["--method", "fedavg", "--local-steps", "10"],
            "but fedavg sends weights; choose another method",
        ),
        ("local-steps", [], "local_steps is 1, which fewer than two of .* choose a multiple of 300 to use all of them"),
        ("sparsity", ["--tasks", "embedded,embedded-topic"], "takes one task, got embedded, embedded-topic"),
        ("selection", ["--tasks", "embedded,sst3"], "unknown task 'sst3'"),
        ("attacks", ["--attack", "scale"], "the experiment attacks sets attack itself"),
        ("attacks", ["--clip", "0"], "the experiment attacks also runs with clipped scalars; set --clip above 0"),
        ("attacks", [], "trimmed-mean with trim 0.2 of 4 clients a round cuts none"),
        ("concentration", ["--calibration-texts", "16"], r"has 1 batch\(es\), but 3 seeds need one each; increase"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_experiment_are_rejected(
    name: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = run_experiment(name, tmp_path / "e", *arguments)
    assert result.exit_code == 1
    assert re.search(message, result.output), result.output
    assert not (tmp_path / "e" / "runs").exists()


def test_a_directory_with_other_tasks_is_rejected(tmp_path: Path) -> None:
    assert run_experiment("gradip", tmp_path / "e", "--seeds", "1").exit_code == 0
    result = run_experiment("gradip", tmp_path / "e", "--seeds", "1", "--tasks", "embedded-topic")
    assert result.exit_code == 1
    assert "holds an experiment with other settings" in result.output


def test_drift_is_the_distance_of_the_clients_weights_from_the_average(tmp_path: Path) -> None:
    """Compares with explicit update vectors, with a schedule, several queries and clients that are stopped early."""
    settings = {
        "rounds": 2, "local_steps": 3, "queries": 2, "schedule": "linear", "eval_examples": 40, "calibration_texts": 32,
        "vp_steps": 4, "vp_initial": 2, "vp_later": 2, "method": "meerkat-vp", "clients": 4, "partition": "mixed",
        "vp_rho_later": 0.0, "vp_rho_quie": 0.4, "vp_sigma": 0.03,
    }  # fmt: skip
    summary = execute(make_config(settings), tmp_path / "r", lambda _: None, lambda _: None)
    assert 0 < len(summary["stopped"]) < 4
    ids = SparseMask.load(tmp_path / "r" / "mask.safetensors").ids
    ledger = read_ledger(tmp_path / "r" / "ledger.jsonl")
    squares = []
    for line in ledger.rounds:
        z = [stream.normal(seed, ids).double() for seed in ledger.header.terms.seeds(line.round)]
        rates = [lr / 2 for lr in line.lr for _ in range(2)]
        average = sum(lr * g * z_t for lr, g, z_t in zip(rates, line.scalars, z, strict=True))
        for scalars in line.clients.values():
            end = sum(lr * g * z_t for lr, g, z_t in zip(rates, scalars, z, strict=False))
            squares.append(float((end - average).square().sum()))
    expected = (sum(squares) / len(squares)) ** 0.5
    assert local_steps._drift(tmp_path / "r") == pytest.approx(expected, rel=0.1)  # z: nearly orthogonal


def test_a_skipped_query_does_not_count_as_drift_of_its_own() -> None:
    """The client's weights stay where they are, while the average moves on."""
    line = RoundRecord(round=1, lr=[0.5, 0.5], scalars=[2.0, 4.0], clients={0: [math.nan, 6.0], 1: [2.0]})
    assert local_steps._squares(line, [0.5, 0.5]) == [1.0 + 1.0, 0.0 + 4.0]


def test_detection_adds_up_the_clients_of_all_seeds(tmp_path: Path) -> None:
    result = run_experiment("selection", tmp_path / "e", "--seeds", "2", "--tasks", "embedded", "--vp-rho-later", "0",
                  "--vp-rho-quie", "0", "--vp-sigma", "1e9", "--arms", "*; detection; 50; clients")  # fmt: skip
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if "4 of 8" in line]
    assert [cell.strip() for cell in line.split("|")][1:8] == [  # all clients are flagged
        "embedded", "50", "clients", "4 of 8", "8", "0.50", "1.00"
    ]  # fmt: skip


def selection_run(seed: int, scores: list[float], own: list[float], stopped: list[int] | None = None) -> FinishedRun:
    """A run of two rounds with three clients: scores of each round, own accuracy of each client."""
    lines = [{"round": i, "accuracy": score} for i, score in enumerate(scores)]
    labels = [[6, 0], [2, 4], [2, 0]]
    summary = {"accuracy_after": scores[-1], "client_accuracy": own, "client_accuracy_worst": min(own),
               "examples_by_client_and_label": labels}  # fmt: skip
    if stopped is not None:
        summary["stopped"] = stopped
    return FinishedRun(config={"seed": seed, "rounds": 2}, lines=lines, summary=summary)


def test_selection_compares_the_same_clients_and_seeds_in_all_arms() -> None:
    arms = {
        "t; mixed; meerkat": [
            selection_run(0, [0.1, 0.5, 0.75], [0.5, 0.75, 1.0]),
            selection_run(1, [0.1, 0.25, 0.5], [0.25, 0.5, 0.5]),
            selection_run(2, [0.1, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ],
        "t; mixed; meerkat-vp, keep": [
            selection_run(0, [0.1, 0.75, 1.0], [1.0, 0.5, 1.0], [0, 2]),
            selection_run(1, [0.1, 0.5, 0.75], [1.0, 1.0, 1.0], [2]),
        ],
        "t; Dirichlet 0.5; meerkat-vp, share": [selection_run(5, [0.1, 0.5, 0.5], [1.0, 1.0, 1.0], [1])],
    }
    tables = Selection().table(Results(arms=arms, measured=None))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.splitlines()[2:5]]
    assert rows[0][3:] == ["0.250 ± 0.250", "0.417 ± 0.382", "", "", "0.250 ± 0.250", "0.625 ± 0.177", "0, 0, 0"]
    assert rows[1][3:] == ["0.625 ± 0.177", "0.875 ± 0.177", "+0.250 ± 0.000 *", "+0.250 ± 0.000 *", "0.750 ± 0.354",
                           "1.000 ± 0.000", "2, 1"]  # fmt: skip
    assert rows[2][3:] == ["0.500", "0.500", "", "", "1.000", "none", "1"]  # no arm to compare it with
    assert "hold: t; mixed: 0.50 ± 0.42." in tables  # 8 of 10 and 2 of 10 of the first class


def test_over_seeds_shows_mean_and_standard_deviation() -> None:
    assert over_seeds([0.5]) == "0.500"
    assert over_seeds([0.4, 0.6]) == "0.500 ± 0.141"
    assert over_seeds([0.4, math.inf, 0.6]) == "not finite in 1 of 3"
