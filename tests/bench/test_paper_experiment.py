"""Tests of ``experiment paper``, and of what it relies on: records, arms, shared work, searches, paired differences."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from scipy import stats

from meerkat_engine.bench.experiments.finished import FinishedRun
from meerkat_engine.bench.experiments.paired import difference_of, paired_difference, shown
from meerkat_engine.bench.experiments.paper import _published
from meerkat_engine.cli import main

TINY = ("--local-steps", "10", "--eval-examples", "40", "--calibration-texts", "16", "--clients", "2", "--batch-size",
        "4", "--rounds", "3")  # fmt: skip
ARMS = ("--arms", "T = 10, meerkat", "--arms", "T = 10, decomfl")


def run_paper(output: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["experiment", "paper", *TINY, *options, "--output", str(output)])


def made(output: str) -> list[str]:
    """The runs that were made, as the log names them."""
    return [line.removeprefix("paper: ") for line in output.splitlines() if line.startswith("paper: T = ")]


def table_of(output: str) -> str:
    return output.split("**")[-1].split("wrote")[0]


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output: Path = tmp_path_factory.mktemp("paper") / "paper"
    return output, run_paper(output, "--seeds", "2", *ARMS)


def cells(result: Result, arm: str) -> list[str]:
    (line,) = [line for line in result.output.splitlines() if line.startswith(f"| {arm} ")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_table_compares_at_equal_forwards_with_rates_of_searches(paper: tuple[Path, Result]) -> None:
    output, result = paper
    assert result.exit_code == 0, result.output
    meerkat, decomfl = cells(result, "meerkat"), cells(result, "decomfl")
    for row, method in ((meerkat, "meerkat"), (decomfl, "decomfl")):
        chosen = json.loads((output / "rates" / f"{method}.json").read_text())["chosen"]["lr"]
        assert float(row[1]) == chosen
        assert row[2] == "2"
        assert row[7] == "60"  # 30 steps of 2 forwards, 10 of 6
        runs = [FinishedRun.recorded(path) for path in sorted((output / "records").glob(f"*-{method}/*"))]
        assert [run.config["lr"] for run in runs] == [chosen] * 2
        assert float(row[3].split()[0]) == pytest.approx(statistics.fmean(run.after for run in runs), abs=6e-4)
    assert meerkat[5] == ""
    assert decomfl[5].startswith(("+", "-"))
    assert (output / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_search_uses_a_seed_that_no_run_has(paper: tuple[Path, Result]) -> None:
    output, _ = paper
    assert json.loads((output / "searches" / "meerkat" / "search.json").read_text())["seed"] == "1000"


def test_records_alone_are_enough(paper: tuple[Path, Result], tmp_path: Path) -> None:
    """Runs, masks and searches may be deleted: what is committed of an experiment goes on elsewhere."""
    output, first = paper
    for name in ("records", "rates"):
        shutil.copytree(output / name, tmp_path / "e" / name)
    shutil.copy(output / "config.toml", tmp_path / "e")
    again = run_paper(tmp_path / "e", "--seeds", "2", *ARMS)
    assert again.exit_code == 0, again.output
    assert made(again.output) == []
    assert table_of(again.output) == table_of(first.output)
    (tmp_path / "e" / "records" / "t-10-decomfl" / "seed-1.json").unlink()
    more = run_paper(tmp_path / "e", "--seeds", "2", *ARMS)
    assert made(more.output) == ["T = 10, decomfl, seed 1"]
    without_times = [line.rsplit("|", 2)[0] for line in table_of(more.output).splitlines()]
    assert without_times == [line.rsplit("|", 2)[0] for line in table_of(first.output).splitlines()]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": "meerkat-experiment-run/2"}', b'{"a": 1}'])
def test_a_damaged_record_is_named(paper: tuple[Path, Result], tmp_path: Path, content: bytes) -> None:
    shutil.copytree(paper[0], tmp_path / "e")
    record = tmp_path / "e" / "records" / "t-10-meerkat" / "seed-0.json"
    record.write_bytes(content)
    result = run_paper(tmp_path / "e", "--seeds", "2", *ARMS)
    assert result.exit_code == 1
    assert f"{record} is no record of a finished run" in result.output.replace("\n", "")


def test_a_directory_of_a_version_with_fewer_settings_goes_on(paper: tuple[Path, Result], tmp_path: Path) -> None:
    shutil.copytree(paper[0], tmp_path / "e")
    config = tmp_path / "e" / "config.toml"
    lines = config.read_text().splitlines(keepends=True)
    assert any(line.startswith("layout =") for line in lines)
    config.write_text("".join(line for line in lines if not line.startswith("layout =")))
    result = run_paper(tmp_path / "e", "--seeds", "2", *ARMS)
    assert result.exit_code == 0, result.output
    assert made(result.output) == []


def test_an_unknown_arm_is_refused_with_the_names(tmp_path: Path) -> None:
    result = run_paper(tmp_path / "e", "--arms", "T = 7*")
    assert result.exit_code == 1
    assert "no arm matches 'T = 7*'; the arms are: T = 10, meerkat; " in result.output.replace("\n", " ")
    assert not (tmp_path / "e").exists()


def test_steps_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    result = run_paper(tmp_path / "e", "--rounds", "4")
    assert result.exit_code == 1
    assert "rounds times local_steps is 40; it must be a multiple of 30" in result.output


def test_experiments_that_need_all_arms_wait_for_them(tmp_path: Path) -> None:
    def run(*options: str) -> Result:
        arguments = ["experiment", "gradip", *TINY, "--vp-steps", "8", "--vp-initial", "3", "--vp-later", "4",
                     "--vp-null-paths", "3", "--seeds", "1", "--output", str(tmp_path / "e"), *options]  # fmt: skip
        return CliRunner().invoke(main, arguments)

    part = run("--arms", "IID")
    assert part.exit_code == 0, part.output
    assert "lacks runs of other arms" in part.output
    assert not (tmp_path / "e" / "result.md").exists()
    whole = run()
    assert whole.exit_code == 0, whole.output
    assert [line for line in whole.output.splitlines() if "seed 0" in line] == ["gradip: single label, seed 0"]
    shutil.rmtree(tmp_path / "e" / "runs")
    assert table_of(run().output) == table_of(whole.output)  # GradIP is in the records


def test_two_processes_share_the_runs(tmp_path: Path) -> None:
    options = [*TINY, "--rounds", "1", "--local-steps", "1", "--seeds", "1", "--output", str(tmp_path / "e")]
    command = [sys.executable, "-m", "meerkat_engine", "experiment", "sparsity", *options]
    (tmp_path / "e").mkdir()
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "ab"]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    runs = [line for output in outputs for line in output.splitlines() if line.endswith("seed 0")]
    assert len(runs) == len(set(runs)) == 8
    assert table_of(outputs[0]) == table_of(outputs[1])


def run_with(seed: int, accuracy: float, **config: Any) -> FinishedRun:
    summary = {"accuracy_before": 0.5, "accuracy_after": accuracy, "validation_loss_after": 1.0}
    return FinishedRun(config={"seed": seed, **config}, lines=[], summary=summary)


def test_differences_are_paired_by_seed_with_students_interval() -> None:
    runs = [run_with(seed, value) for seed, value in ((0, 0.9), (1, 0.8), (2, 0.95), (7, 0.1))]
    others = [run_with(seed, value) for seed, value in ((2, 0.9), (0, 0.8), (1, 0.74))]
    found = paired_difference(runs, others, lambda run: run.after)
    assert found is not None
    interval = stats.ttest_rel([0.9, 0.8, 0.95], [0.8, 0.74, 0.9]).confidence_interval(0.95)
    assert found.mean == pytest.approx(0.07)
    assert found.mean - found.half_width == pytest.approx(interval.low, abs=1e-4)
    assert found.mean + found.half_width == pytest.approx(interval.high, abs=1e-4)
    assert found.excludes_zero == (interval.low > 0)
    assert paired_difference(runs[:1], others[:1], lambda run: run.after) is None


@pytest.mark.parametrize("seeds", range(2, 12))
def test_the_quantiles_are_students(seeds: int) -> None:
    values = [0.1 * (i % 3) for i in range(seeds)]
    expected = stats.t.ppf(0.975, seeds - 1) * statistics.stdev(values) / seeds**0.5
    assert difference_of(values).half_width == pytest.approx(expected, rel=1e-3)


def test_one_seed_shows_no_difference_and_a_run_that_diverged_none_either() -> None:
    assert not difference_of([0.4]).excludes_zero
    assert shown(difference_of([0.4])) == "+0.400"
    assert shown(difference_of([0.4, 0.4])) == "+0.400 ± 0.000 *"
    assert shown(difference_of([0.4, float("inf"), float("nan")])) == "not finite"
    assert not difference_of([0.4, float("inf")]).excludes_zero


def test_the_papers_accuracy_stands_beside_its_tasks_alone() -> None:
    assert _published(run_with(0, 0.9, task="sst2"), "meerkat") == ["0.916"]
    assert _published(run_with(0, 0.9, task="sst2"), "decomfl") == [""]
    assert _published(run_with(0, 0.9, task="trec"), "meerkat") == []
