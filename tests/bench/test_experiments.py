"""``meerkat-engine experiment``: each runs, says what it found, and does not run anything twice."""

import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from meerkat_engine.bench.experiments.command import EXPERIMENTS
from meerkat_engine.bench.tables import over_seeds
from meerkat_engine.fed.cli import main

TINY = ("--rounds", "1", "--local-steps", "1", "--eval-examples", "40", "--calibration-texts", "16", "--vp-steps", "8",
        "--vp-initial", "3", "--vp-later", "4", "--vp-null-paths", "3", "--clients", "4", "--batch-size", "8",
        "--eval-every", "1")  # fmt: skip


def call(name: str, output: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["experiment", name, *TINY, *more, "--output", str(output)])


@pytest.fixture(scope="module")
def sparsity(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output: Path = tmp_path_factory.mktemp("experiments") / "sparsity"
    return output, call("sparsity", output, "--seeds", "2")


EXPECTED = {
    "gradip": "gradient norm    | single label",
    "selection": "embedded-topic | random-stop",
    "local-steps": "T = 100",
    "mask-source": "the task trained on | 100.00%",
    "concentration": "the top 1.00% of the elements hold",
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_ends_in_a_table_and_a_figure(name: str, tmp_path: Path) -> None:
    result = call(name, tmp_path / "e", "--seeds", "1")
    assert result.exit_code == 0, result.output
    table = (tmp_path / "e" / "result.md").read_text()
    assert table.strip() in result.output
    wanted = EXPECTED[name].split(" | ")
    assert any(all(part.strip() in line for part in wanted) for line in table.splitlines()), table
    widths = {line.count("|") for line in table.split("\n\n")[1].splitlines()}
    assert len(widths) == 1  # no cell breaks the table
    assert (tmp_path / "e" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_all_experiments_are_tested() -> None:
    assert {*EXPECTED, "sparsity"} == set(EXPERIMENTS)


def test_arms_and_seeds_are_run_directories(sparsity: tuple[Path, Result]) -> None:
    output, result = sparsity
    assert result.exit_code == 0, result.output
    found = sorted(str(p.relative_to(output / "runs")) for p in output.glob("runs/*/*"))
    assert len(found) == 2 * 4 * 2
    assert "iid-u-0.001/seed-0" in found
    assert "dirichlet-0.5-u-1e-05/seed-1" in found
    assert re.search(r"iid, u = 0\.01 +\| 838 ", result.output)
    assert len(list((output / "masks").iterdir())) == 4  # one a density, shared by partitions and seeds


def test_finished_runs_are_not_run_again(sparsity: tuple[Path, Result]) -> None:
    output, first = sparsity
    lost = output / "runs" / "iid-u-0.001" / "seed-1"
    kept = output / "runs" / "iid-u-0.001" / "seed-0" / "metrics.jsonl"
    before = kept.stat().st_mtime_ns
    shutil.move(lost, lost.with_name("seed-1.unfinished"))  # as if the experiment had been stopped there
    again = call("sparsity", output, "--seeds", "2")
    assert again.exit_code == 0, again.output
    assert [line for line in again.output.splitlines() if "seed" in line] == ["sparsity: iid, u = 0.001, seed 1"]
    assert kept.stat().st_mtime_ns == before
    assert [p.name for p in lost.parent.iterdir()] == ["seed-0", "seed-1"] or lost.exists()
    assert again.output.split("**")[-1].split("wrote")[0] == first.output.split("**")[-1].split("wrote")[0]


def test_other_settings_and_other_files_are_refused(sparsity: tuple[Path, Result], tmp_path: Path) -> None:
    output, _ = sparsity
    result = call("sparsity", output, "--lr", "0.5")
    assert result.exit_code == 1
    assert "holds an experiment with other settings" in result.output
    (tmp_path / "mine.txt").write_text("mine")
    result = call("gradip", tmp_path)
    assert result.exit_code == 1
    assert "holds other files; choose another --output, nothing was changed" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_over_seeds() -> None:
    assert over_seeds([0.5]) == "0.500"
    assert over_seeds([0.4, 0.6]) == "0.500 ± 0.141"
