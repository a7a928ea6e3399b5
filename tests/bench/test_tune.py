"""``meerkat-engine tune`` finds a learning rate by runs that are stopped and resumed, and says what it did and cost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from meerkat_engine.bench.tune import search as search_module
from meerkat_engine.bench.tune.base import Base
from meerkat_engine.engine.errors import ModelChangedError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.fed import execute, make_config
from meerkat_engine.fed.config.toml import read_toml
from meerkat_engine.fed.run import inputs as inputs_module
from meerkat_engine.fed.run import rounds

from helpers.command import call
from helpers.killing import contents, quiet
from helpers.missing import environment_without

TINY = (
    "--rounds",
    "8",
    "--local-steps",
    "1",
    "--batch-size",
    "8",
    "--calibration-texts",
    "16",
    "--eval-examples",
    "40",
)
RATES = ("--lrs", "0.02,0.002,100,0.005,0.01")


def tune(output: Path, *options: str) -> Result:
    return call("tune", *TINY, *options, "--output", output)


def read_result(output: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((output / "tune.json").read_text())
    return result


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output: Path = tmp_path_factory.mktemp("tune") / "tuned"
    return output, tune(output, *RATES)


def test_the_chosen_run_has_the_smallest_loss_of_those_that_got_to_the_end(searched: tuple[Path, Result]) -> None:
    output, printed = searched
    assert printed.exit_code == 0, printed.output
    result = read_result(output)
    last = {run["lr"]: run["validation_loss"]["4"] for run in result["runs"] if "4" in run["validation_loss"]}
    chosen = min(last, key=last.__getitem__)
    assert result["rungs"] == [1, 2, 4]
    assert len(last) >= 2
    assert last[chosen] < result["validation_loss_before"]
    assert result["smallest_loss"]["lr"] == result["chosen"]["lr"] == chosen == read_toml(output / "config.toml")["lr"]
    row = next(line for line in printed.output.splitlines() if line.endswith("| chosen            |"))
    assert row.split()[1:9:2] == [f"{chosen:g}", "4", f"{result['validation_loss_before']:.4f}", f"{last[chosen]:.4f}"]
    assert (output / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_what_diverges_falls_out_first(searched: tuple[Path, Result]) -> None:
    runs = {run["lr"]: run for run in read_result(searched[0])["runs"]}
    assert runs[100]["verdict"] == "diverged"
    assert list(runs[100]["validation_loss"]) == ["1"]
    assert len(runs) == 5


def test_the_chosen_settings_give_the_run_that_was_measured(searched: tuple[Path, Result], tmp_path: Path) -> None:
    """The same ledger: shared model and mask, stops and resumes leave no trace, and no file of the search is needed."""
    output, _ = searched
    config = make_config(read_toml(output / "config.toml"))
    assert config.mask.file is None
    execute(config, tmp_path / "run", quiet, quiet)
    best = next(run for run in read_result(output)["runs"] if run["verdict"] == "chosen")
    measured = (output / "runs" / best["directory"] / "ledger.jsonl").read_text().splitlines()
    assert len(measured) == 1 + 4
    assert (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()[: len(measured)] == measured


def test_the_cost_counts_every_step_and_forward_pass(searched: tuple[Path, Result], tmp_path: Path) -> None:
    output, printed = searched
    cost = read_result(output)["cost"]
    number = sum(run["rounds"] for run in read_result(output)["runs"])
    assert cost["steps"] == 4 * number  # four clients, one step a round
    assert cost["forward_passes"] == 2 * cost["steps"]
    assert cost["full_runs"] == number / 8
    assert cost["evaluations"] == 1 + number  # after every round, because the first rung is 1
    assert f"5 runs, {4 * number} local steps ({8 * number} forward passes over a batch)" in printed.output
    assert tune(tmp_path / "t", "--method", "decomfl", "--lrs", "0.001,0.002", "--rounds", "2").exit_code == 0
    cost = read_result(tmp_path / "t")["cost"]
    assert cost["forward_passes"] == (5 + 1) * cost["steps"]


def test_the_cost_counts_the_calibration_of_early_stopping_once_a_run(tmp_path: Path) -> None:
    options = ("--vp-steps", "6", "--vp-initial", "2", "--vp-later", "3", "--vp-null-paths", "3", "--rounds", "2")
    result = tune(tmp_path / "t", "--method", "meerkat-vp", *options, "--lrs", "0.005,0.01")
    assert result.exit_code == 0, result.output
    cost = read_result(tmp_path / "t")["cost"]
    assert cost["steps"] == 2 * (4 * 6 + 4)  # two runs of a calibration and one round
    assert cost["full_runs"] == 2 * (4 * 6 + 4) / (4 * 6 + 2 * 4)


def test_what_runs_share_is_loaded_chosen_and_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations, evaluate = [], rounds.evaluate
    monkeypatch.setattr(rounds, "evaluate", lambda *of, **how: evaluations.append(of) or evaluate(*of, **how))
    loads, load = [], embedded.load
    monkeypatch.setattr(embedded, "load", lambda *given, **options: loads.append(given) or load(*given, **options))
    monkeypatch.setattr(inputs_module, "make_mask", None)  # a run has the mask of the search
    result = tune(tmp_path / "t", "--lrs", "0.005,0.01", "--rounds", "4")
    assert result.exit_code == 0, result.output
    assert len(loads) == 1
    assert result.output.count("choosing the mask") == 1
    assert result.output.count("evaluating the base model") == 1
    assert len(evaluations) == read_result(tmp_path / "t")["cost"]["evaluations"] - 1


def test_a_second_call_repeats_nothing(searched: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    output, first = searched
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    monkeypatch.setattr(embedded, "load", None)  # the model is not needed either
    again = tune(output, *RATES)
    assert again.exit_code == 0, again.output
    assert again.output in first.output
    assert "rounds 1 to" not in again.output
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


def test_a_killed_search_goes_on_to_the_same_result(searched: tuple[Path, Result], tmp_path: Path) -> None:
    expected, output = searched[0], tmp_path / "tuned"
    command = [sys.executable, "-m", "meerkat_engine", "tune", *TINY, *RATES, "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while len(list(output.glob("runs/*/origin.json"))) < 3:  # in its third run
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "tune.json").exists()
    assert tune(output, *RATES).exit_code == 0
    assert read_result(output) == read_result(expected)
    assert (output / "config.toml").read_text() == (expected / "config.toml").read_text()
    for run in (expected / "runs").iterdir():
        assert contents(output / "runs" / run.name) == contents(run)


def test_other_settings_other_files_and_a_second_process_are_refused(
    searched: tuple[Path, Result], tmp_path: Path
) -> None:
    output, _ = searched
    other = tune(output, *RATES, "--eps", "0.01")
    assert other.exit_code == 1
    assert f"the search in {output} has eps 0.001, now it is 0.01; give the same settings to go on" in other.output
    assert "has lrs [0.02, 0.002, 100.0, 0.005, 0.01], now it is []" in tune(output).output
    (tmp_path / "notes.txt").write_text("notes")
    assert f"{tmp_path} holds other files" in tune(tmp_path).output
    assert f"{tmp_path / 'notes.txt'} is a file" in tune(tmp_path / "notes.txt").output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (output / "search.json").rename(tmp_path / "search.json")
    try:
        assert f"{output} holds other files" in tune(output, *RATES).output
        (output / "search.json").write_text("{")
        assert f"{output / 'search.json'} is damaged" in tune(output, *RATES).output
    finally:
        (tmp_path / "search.json").replace(output / "search.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lrs", "0.1,fast"], "could not convert string to float: 'fast'; give numbers separated by commas"),
        (["--lrs", "0.1"], "--lrs has only 0.1; give two learning rates or more"),
        (["--lrs", "0.1,-1"], "--lrs must be positive and finite, got -1"),
        (["--lrs", "0.1,nan"], "--lrs must be positive and finite, got nan"),
        (["--lr", "0"], "lr is 0, so there is no rate to search around"),
        (["--tune-rounds", "9"], "--tune-rounds 9 is more than the 8 rounds of a full run"),
        (["--tune-eps", "--method", "fedavg"], "fedavg draws no perturbations, so it has no eps"),
        (["--tune-density", "--method", "lora-fedzo"], "--tune-density tries other densities, and lora-fedzo has none"),
        (["--tune-density", "--mask", "m"], "--tune-density tries other densities, and the mask file has one"),
        (["--calibration", "missing.jsonl"], "calibration 'missing.jsonl' does not exist"),
        (["--lr", "1e32"], "max_scalar"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_searched_are_one_clear_error(tmp_path: Path, options: list[str], message: str) -> None:
    result = tune(tmp_path / "t", *options)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert result.output.count("Error:") == 1
    assert not (tmp_path / "t").exists()


def test_if_no_run_is_better_than_the_base_model_nothing_is_recommended(tmp_path: Path) -> None:
    result = tune(tmp_path / "t", "--lrs", "50,100", "--rounds", "2")
    assert result.exit_code == 1
    assert "Error: all runs diverged, also lr-50: its held-out loss is " in result.output
    assert "| diverged |" in result.output
    assert not (tmp_path / "t" / "config.toml").exists()


def test_a_run_whose_losses_are_not_finite_is_out_and_the_search_goes_on(tmp_path: Path) -> None:
    result = tune(tmp_path / "t", "--method", "fedavg", "--lrs", "0.1,1e25", "--rounds", "2", "--local-steps", "2")
    assert result.exit_code == 0, result.output
    assert read_result(tmp_path / "t")["chosen"]["lr"] == 0.1
    assert "| failed: client 0, round 1: " in result.output
    assert (
        tune(tmp_path / "t", "--method", "fedavg", "--lrs", "0.1,1e25", "--rounds", "2", "--local-steps", "2").exit_code
        == 0
    )


def test_a_warning_names_its_run(tmp_path: Path) -> None:
    result = tune(tmp_path / "t", "--lrs", "0.005,1e6", "--local-steps", "9", "--rounds", "2")
    assert "lr-1e+06: the last 8 queries had equal losses at both points" in result.output
    assert "lr-0.005: the last" not in result.output


def test_eps_and_density_are_searched_on_request(tmp_path: Path) -> None:
    output = tmp_path / "t"
    result = tune(output, "--rounds", "2", "--tune-eps", "--tune-density", "--lrs", "0.01,0.02")
    assert result.exit_code == 0, result.output
    runs = read_result(output)["runs"]
    assert {0.01, 0.0001} <= {run["eps"] for run in runs}
    densities = {run["density"] for run in runs}
    assert {0.01, 0.03162, 0.003162} <= densities
    assert len(list((output / "masks").iterdir())) == len(densities)
    moved = next(run for run in runs if run["density"] == 0.03162)
    assert moved["lr"] in (0.005623, 0.01125)  # divided by the square root of the factor
    chosen = read_result(output)["chosen"]
    assert {name: read_toml(output / "config.toml")[name] for name in chosen} == chosen
    titles = next(line for line in result.output.splitlines() if line.startswith("| lr"))
    assert titles.split()[1:9:2] == ["lr", "eps", "density", "rounds"]


def test_a_best_value_at_the_edge_of_the_given_rates_is_a_warning(tmp_path: Path) -> None:
    result = tune(tmp_path / "t", "--rounds", "2", "--lrs", "0.001,0.002")
    assert "warning: the best run has the largest lr of the search, so a better one may lie beyond" in result.output
    assert read_result(tmp_path / "t")["warnings"] == [
        "the best run has the largest lr of the search, so a better one may lie beyond: search again from there"
    ]


def test_a_choice_of_half_the_learning_rate_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "_NEARLY", 0.1)
    result = tune(tmp_path / "t", "--rounds", "2", "--lrs", "0.001,0.002")
    assert "lr-0.001 has " in result.output
    assert "% of the improvement of lr-0.002 at a smaller learning rate, which is safer" in result.output
    assert [run["verdict"] for run in read_result(tmp_path / "t")["runs"]] == ["chosen", "smallest loss"]
    assert read_toml(tmp_path / "t" / "config.toml")["lr"] == 0.001


def test_without_matplotlib_only_the_figure_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meerkat_engine", "tune", *TINY, "--rounds", "1", "--lrs", "0.01,0.02"]
    done = subprocess.run([*command, "--output", str(tmp_path / "t")], env=environment_without(tmp_path),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no figure: figures need the package matplotlib" in done.stdout
    assert {path.name for path in (tmp_path / "t").iterdir()} >= {"tune.json", "config.toml"}
    assert not (tmp_path / "t" / "figure.png").exists()


def test_a_run_on_a_shared_model_that_has_moved_is_refused(tmp_path: Path) -> None:
    config = make_config({"rounds": 1, "local_steps": 1, "calibration_texts": 16, "eval_examples": 40})
    base = Base(config, tmp_path, quiet, trust_remote_code=False)
    with base.shared(config) as shared:
        next(shared.lm.model.parameters()).data[0, 0] += 1
        with pytest.raises(ModelChangedError, match="the shared model is no longer the base model"):
            execute(config, tmp_path / "run", quiet, quiet, shared=shared)
    assert not (tmp_path / "run").exists()


def test_free_text_is_judged_by_its_loss_and_nothing_is_generated(tmp_path: Path) -> None:
    task = embedded.TASKS["embedded"]
    rows = [
        {"prompt": task.prompt(row), "completion": task.label_words[task.class_of(row)]}
        for row in embedded.rows("train", "embedded")[:200]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, data = tmp_path / "t", ("--model", "embedded", "--data", str(tmp_path / "rows.jsonl"))
    result = tune(output, *data, "--metrics", "exact-match", "--rounds", "2", "--lrs", "0.002,0.005")
    assert result.exit_code == 0, result.output
    assert "| perplexity |" in result.output
    assert read_toml(output / "config.toml")["metrics"] == "exact-match"
    assert "exact_match" not in next(output.glob("runs/*/metrics.jsonl")).read_text()
