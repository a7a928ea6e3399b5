"""Complete runs through the command line: the embedded default, models from a directory, and wrong input."""

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM

from meerkat_engine import SparseMask
from meerkat_engine.cli import main
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.fed import read_ledger
from meerkat_engine.fed.config.run_config import SETTINGS, make_config
from meerkat_engine.fed.config.toml import read_toml
from meerkat_engine.fed.setup.data import read_rows

from helpers.command import call, metrics_of
from helpers.killing import contents
from helpers.models import make_byte_tokenizer, make_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*tied weights:UserWarning")

SMALL = ("--rounds", "2", "--local-steps", "2", "--calibration-texts", "32", "--eval-examples", "60")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run of the embedded default, as a user starts it."""
    output = tmp_path_factory.mktemp("runs") / "default"
    return output, call("run", "--output", output)


def test_the_embedded_default_learns(finished: tuple[Path, Result]) -> None:
    output, result = finished
    assert result.exit_code == 0, result.output
    summary = metrics_of(output)[-1]["summary"]
    assert summary["accuracy_before"] < 0.6
    assert summary["accuracy_after"] >= summary["accuracy_before"] + 0.3
    assert (
        f"accuracy        {summary['accuracy_before']:.4f} before, {summary['accuracy_after']:.4f} after "
        f"(400 held-out examples); macro-F1 {summary['macro_f1_before']:.4f}, {summary['macro_f1_after']:.4f}\n"
        in result.output
    )
    assert summary["macro_f1_after"] >= summary["macro_f1_before"] + 0.3
    assert summary["truncated_train"] == summary["truncated_validation"] == 0
    assert "cut to fit" not in result.output
    assert "\r" not in result.output  # no progress bar where there is no terminal


def test_the_default_clients_are_not_iid(finished: tuple[Path, Result]) -> None:
    counts = torch.tensor(metrics_of(finished[0])[-1]["summary"]["examples_by_client_and_label"]).double()
    share = counts[:, 0] / counts.sum(1)
    assert share.max() - share.min() > 0.4


def test_the_run_directory_has_all_files_and_metrics(finished: tuple[Path, Result]) -> None:
    output, _ = finished
    assert sorted(p.name for p in output.iterdir()) == [
        ".lock",
        "config.toml",
        "gradip.jsonl",
        "ledger.jsonl",
        "mask.safetensors",
        "metrics.jsonl",
        "origin.json",
        "snapshot.safetensors",
    ]
    assert make_config(read_toml(output / "config.toml")) == make_config({"dtype": "float32"})
    lines = metrics_of(output)
    assert [line["round"] for line in lines[:-1]] == list(range(31))
    for line in lines[:-1]:
        assert {"round", "loss", "bytes_up", "bytes_down", "seconds"} <= line.keys()
        assert ("macro_f1" in line) == ("accuracy" in line) == (line["round"] % 5 == 0)
    summary = lines[-1]["summary"]
    assert summary["bytes_up"] == sum(line["bytes_up"] for line in lines[:-1]) == 30 * 4 * (40 + 4 * 5)
    assert summary["steps"] == 30 * 4 * 5
    assert (output / "ledger.jsonl").stat().st_size < 100_000


def test_the_ledger_replays_to_the_same_bits_and_accuracy(finished: tuple[Path, Result], tmp_path: Path) -> None:
    output, _ = finished
    result = call("replay", output, "--output", tmp_path / "checkpoint")
    assert result.exit_code == 0, result.output
    assert "the same bits as at the end of the run" in result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    summary = metrics_of(output)[-1]["summary"]
    assert fingerprint(model) == summary["weights"]
    from meerkat_engine.engine.lm.evaluation import evaluate
    from meerkat_engine.engine.lm.examples import EncodedTask

    data = EncodedTask(
        embedded.TASKS[embedded.NAME], embedded.rows("validation"), embedded.load().tokenizer, 256, "validation"
    )
    assert evaluate(model.eval(), data).scores["accuracy"] == summary["accuracy_after"]


def test_replay_reports_weights_that_differ_from_the_summary(finished: tuple[Path, Result], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.toml", "mask.safetensors", "metrics.jsonl"):
        (copy / name).write_bytes((finished[0] / name).read_bytes())
    lines = (finished[0] / "ledger.jsonl").read_text().splitlines(keepends=True)
    (copy / "ledger.jsonl").write_text("".join(lines[:-1]))
    result = call("replay", copy)
    assert result.exit_code == 1
    assert "replayed 29 rounds" in result.output
    assert "the run ended with other weights" in result.output


def test_learning_rate_zero_leaves_the_model_unchanged(tmp_path: Path) -> None:
    result = call("run", "--lr", "0", *SMALL, "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    summary = metrics_of(tmp_path / "r")[-1]["summary"]
    assert summary["weights"] == summary["base"]
    assert summary["accuracy_after"] == summary["accuracy_before"]


def test_compare_random_runs_a_random_mask_of_the_same_size(tmp_path: Path) -> None:
    result = call("run", "--compare-random", *SMALL, "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    masks = [SparseMask.load(tmp_path / at / "mask.safetensors") for at in ("r", "r/random-mask")]
    assert len(masks[0]) == len(masks[1])
    assert masks[0].digest != masks[1].digest
    assert "accuracy after   meerkat 0." in result.output


@pytest.mark.parametrize("method", ["weight-magnitude", "random-mask", "full-fedzo"])
@pytest.mark.parametrize("partition", ["iid", "single-label"])
def test_methods_run_and_replay_with_every_partition(tmp_path: Path, method: str, partition: str) -> None:
    result = call(
        "run", "--method", method, "--partition", partition, "--lr", "1e-4", *SMALL, "--output", tmp_path / "r"
    )
    assert result.exit_code == 0, result.output
    assert call("replay", tmp_path / "r").exit_code == 0


def test_the_same_settings_give_the_same_run(tmp_path: Path) -> None:
    for name in "ab":
        assert call("run", *SMALL, "--seed", "5", "--output", tmp_path / name).exit_code == 0
    assert call("run", *SMALL, "--seed", "6", "--output", tmp_path / "c").exit_code == 0
    a, b, c = ((tmp_path / name / "ledger.jsonl").read_bytes() for name in "abc")
    assert a == b != c


@pytest.fixture
def directory_model(tmp_path: Path, write_jsonl: Callable[[str, list[str]], Path]) -> Callable[[str], list[str | Path]]:
    """A model of an architecture in a directory, with a task and calibration text."""

    def make(architecture: str) -> list[str | Path]:
        make_model(architecture, vocabulary=300).save_pretrained(tmp_path / "model")  # type: ignore[operator]
        # transformers reads any tokenizer of a Qwen2 model as byte-level
        text = "good bad fine poor film It was terrible great the a"
        tokenizer = make_byte_tokenizer() if architecture == "qwen2" else make_tokenizer(text)
        tokenizer.save_pretrained(tmp_path / "model")
        words = ["good film", "bad film", "a fine film", "the poor film"] * 8
        rows = [
            json.dumps({"sentence": f"{text} {'a ' * (i % 5)}", "label": (i + 1) % 2}) for i, text in enumerate(words)
        ]
        write_jsonl("data/sst2/train.jsonl", rows)
        write_jsonl("data/sst2/validation.jsonl", rows[:8])
        write_jsonl("data/c4_sample/train.jsonl", [json.dumps({"text": text * 3}) for text in words])
        return ["--model", tmp_path / "model", "--task", "sst2", "--data-dir", tmp_path / "data", "--batch-size", "4",
                "--clients", "2", "--rounds", "2", "--local-steps", "2", "--density", "0.05"]  # fmt: skip

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_causal_lm_from_a_directory_is_trained_and_saved(
    directory_model: Callable[[str], list[str | Path]], tmp_path: Path, architecture: str, dtype: str
) -> None:
    arguments = directory_model(architecture)
    result = call("run", *arguments, "--dtype", dtype, "--objective", "language-model", "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    result = call("replay", tmp_path / "r", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    assert fingerprint(saved) == metrics_of(tmp_path / "r")[-1]["summary"]["weights"]


def test_a_mask_file_gives_the_mask_that_the_run_would_choose(
    directory_model: Callable[[str], list[str | Path]], tmp_path: Path
) -> None:
    arguments = directory_model("llama")
    result = call("mask", "--model", tmp_path / "model", "--data-dir", tmp_path / "data", "--density", "0.05",
                  "--output", tmp_path / "m")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert call("run", *arguments, "--output", tmp_path / "own").exit_code == 0
    assert call("run", *arguments, "--mask", tmp_path / "m", "--output", tmp_path / "given").exit_code == 0
    own, given = (SparseMask.load(tmp_path / name / "mask.safetensors") for name in ("own", "given"))
    assert own.digest == given.digest
    assert "m already" not in call("mask", "--output", tmp_path / "m").output
    assert "exists already" in call("mask", "--output", tmp_path / "m").output


def test_options_override_the_settings_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        "rounds = 1\nlocal_steps = 1\n[mask]\ntexts = 16\n[clients]\ncount = 3\n[step]\nlr = 1\n"
    )
    result = call("run", "--config", tmp_path / "c.toml", "--clients", "2", "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    settings = tomllib.loads((tmp_path / "r" / "config.toml").read_text())
    assert (settings["rounds"], settings["clients"]["count"], settings["step"]["lr"]) == (1, 2, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sst3", "--model", "x"], "unknown task 'sst3'; known: ag_news, alpaca, boolq"),
        (["--task", "sst2"], "give both --model and --task, or neither"),
        (["--model", "x"], "give both --model and --task, or neither"),
        (["--density", "0"], "density must be in (0, 1], got 0.0"),
        (["--density", "1.5"], "density must be in (0, 1], got 1.5"),
        (["--clients", "0"], "clients must be at least 1, got 0"),
        (["--eps", "0"], "eps must be finite and positive"),
        (["--lr", "nan"], "lr must be finite"),
        (["--seed", "-1"], "seed must be in"),
        (["--device", "cuda"], "torch sees no CUDA or ROCm device"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--mask", "nowhere"], "mask 'nowhere' does not exist"),
        (["--batch-size", "900"], "800 examples cannot give 4 clients 900 each"),
        (["--batch-size", "150", "--alpha", "0.01"], "fewer than the 150 of a batch"),
        (["--clients", "1", "--partition", "single-label"], "2 labels, 1 clients"),
        (["--model", "no/where", "--task", "sst2"], "there is no directory 'no/where' here"),
        (["--model", "no.gguf", "--task", "sst2"], "there is no GGUF file 'no.gguf'"),
        (["--method", "fedavg", "--lr", "1e30", "--rounds", "3"], "client 0, round 1: the loss of step 1 is nan"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_are_one_error_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = call("run", *SMALL, *arguments, "--output", tmp_path / "r")
    assert result.exit_code == 1
    assert result.output.strip().splitlines()[-1].startswith("Error: ")
    assert message in result.output
    if "--lr" not in arguments or "nan" in arguments:
        assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "sgd"],
            "'sgd' is not one of 'meerkat', 'meerkat-vp', 'meerkat-fzoo', 'random-stop',",
        ),
        (["--partition", "x"], "'x' is not one of 'iid', 'dirichlet', 'single-label', 'mixed', 'natural'"),
        (["--objective", "x"], "'x' is not one of 'candidates', 'language-model', 'language-model-by-example'"),
        (["--dtype", "int8"], "'int8' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        (["--backend", "cuda"], "'cuda' is not one of 'auto', 'torch', 'numba', 'triton'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_value_that_is_no_choice_is_an_error_of_usage(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = call("run", *SMALL, *arguments, "--output", tmp_path / "r")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "r").exists()


def test_choices_complete_in_the_shell() -> None:
    """Tab after ``--method m`` offers the methods that begin so, and names of files after ``--data``."""
    run = main.commands["run"]
    options = {option.name: option for option in run.params}
    context = click.Context(run)
    found = options["method"].shell_complete(context, "m")
    assert [item.value for item in found] == ["meerkat", "meerkat-vp", "meerkat-fzoo"]
    assert [item.type for item in options["data"].shell_complete(context, "x")] == ["file"]


def test_the_same_values_are_errors_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('method = "sgd"\n')
    result = call("run", "--config", tmp_path / "c.toml", "--output", tmp_path / "r")
    assert result.exit_code == 1
    assert "unknown method 'sgd'; known: meerkat" in result.output


def test_unknown_options_and_settings_are_errors(tmp_path: Path) -> None:
    result = call("run", "--learning-rate", "1")
    assert result.exit_code == 2
    assert "No such option" in result.output
    (tmp_path / "c.toml").write_text("learning_rate = 1\n")
    assert (
        "unknown setting 'learning_rate'; known at the top: local_steps, method"
        in call("run", "--config", tmp_path / "c.toml").output
    )
    (tmp_path / "c.toml").write_text("rounds = 'many'\n")
    assert "rounds must be int, got 'many'" in call("run", "--config", tmp_path / "c.toml").output
    (tmp_path / "c.toml").write_text("rounds = \n")
    assert "cannot read the settings in" in call("run", "--config", tmp_path / "c.toml").output
    assert "cannot read the settings in" in call("run", "--config", tmp_path / "none.toml").output


def test_a_mask_of_another_model_is_rejected(tmp_path: Path) -> None:
    SparseMask.random(make_model("opt"), 0.1, 0).save(tmp_path / "m")
    result = call("run", *SMALL, "--mask", tmp_path / "m", "--output", tmp_path / "r")
    assert result.exit_code == 1
    assert "the mask was made for another model: parameter" in result.output


def test_a_run_directory_is_not_overwritten(finished: tuple[Path, Result]) -> None:
    output, _ = finished
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    result = call("run", *SMALL, "--output", output)
    assert result.exit_code == 1
    assert (
        f"the output directory {output} already holds a run; choose another directory, or resume that run with "
        f"--resume {output}; " in result.output
    )
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    result = call("run", *SMALL, "--output", output / "config.toml")
    assert "is a file" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(("method", "file"), [("random-mask", "ledger.jsonl"), ("meerkat", "gradip.jsonl")])
def test_a_full_disk_is_an_error_and_the_run_can_be_resumed(tmp_path: Path, method: str, file: str) -> None:
    """Runs other processes, of which the first may only write files that are little larger than the mask."""
    settings = f"run --clients 12 --partition iid --rounds 40 --local-steps 1 --calibration-texts 16 --method {method}"

    def run(*arguments: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
        script = (
            "import resource, signal, sys\n"
            "from meerkat_engine.cli import main\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"limit = {limit or 'resource.RLIM_INFINITY'}\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
            "main(sys.argv[1:])\n"
        )
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    output, undisturbed = tmp_path / "r", tmp_path / "undisturbed"
    stopped = run(*settings.split(), "--output", str(output), limit=17000)
    assert stopped.returncode == 1
    assert f"Error: cannot write {output / file}: File too large" in stopped.stderr
    assert "are complete" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    replayed = call("replay", output)
    assert "the run did not finish" in replayed.output
    assert 5 < int(replayed.output.split()[1]) < 40
    assert run("run", "--resume", str(output)).returncode == 0
    assert run(*settings.split(), "--output", str(undisturbed)).returncode == 0
    assert contents(output) == contents(undisturbed)


def test_help_names_every_option() -> None:
    text = call("run", "--help").output
    for name in SETTINGS:
        assert f"--{name.replace('_', '-')}" in text


def test_make_config_uses_the_names_of_the_options() -> None:
    with pytest.raises(ConfigError, match="unknown setting"):
        make_config({"rnds": 1})
    assert make_config({"model": "a", "task": "sst2"}).step.lr == 1e-4
    assert make_config({"model": "a", "task": "sst2"}).mask.density == 1e-3
    assert make_config({}).mask.density == 1e-2


def test_mask_check_reports_the_coverage_of_tasks(tmp_path: Path) -> None:
    arguments = ("mask", "--calibration-texts", "32", "--check", "embedded", "--check", "embedded-topic")
    result = call(*arguments, "--output", tmp_path / "m")
    assert result.exit_code == 0, result.output
    coverages = re.findall(
        r"(\S+): holds (\S+)% of the squared gradient \(best mask of that size (\S+)%", result.output
    )
    assert [task for task, *_ in coverages] == ["embedded", "embedded-topic"]
    own_task, other_task = (float(captured) / float(best) for _, captured, best in coverages)
    assert 1 > own_task > 2 * other_task > 0
    again = call("mask", "--mask", tmp_path / "m", "--calibration-texts", "32", "--check", "embedded")
    assert again.output.splitlines()[-1] == next(x for x in result.output.splitlines() if x.startswith("embedded: "))


def test_mask_check_by_density_agrees_with_masks_chosen_at_each_density(tmp_path: Path) -> None:
    few = ("mask", "--calibration-texts", "32", "--check", "embedded")
    result = call(*few, "--density", "0.03", "--by-density")
    assert result.exit_code == 0, result.output
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.output.splitlines() if "%" in line]
    assert [line[0] for line in lines] == [
        f"density {u}" for u in ("1e-05", "3e-05", "0.0001", "0.0003", "0.001", "0.003", "0.01", "0.03")
    ]
    for density, elements, *shares in lines[-3:]:
        plain = call(*few, "--density", density.split()[1]).output
        assert plain.startswith(f"{elements.replace(',', '')} of ")
        expected = re.findall(r"([\d.]+)%", plain)
        assert [float(share.rstrip("%")) for share in shares] == pytest.approx([float(x) for x in expected], abs=0.06)
    assert "give --check TASK" in call("mask", "--by-density", "--output", tmp_path / "m").output
    without = call("mask", "--method", "random-mask", "--check", "embedded", "--by-density")
    assert "(random, seed " in without.output
    assert "has no scores" in without.output


def test_mask_union_unites_mask_files(tmp_path: Path) -> None:
    for method in ("task-mask", "weight-magnitude"):
        assert call("mask", "--method", method, "--calibration-texts", 16, "--output", tmp_path / method).exit_code == 0
    files = (tmp_path / "task-mask", tmp_path / "weight-magnitude")
    result = call("mask-union", *files, "--output", tmp_path / "all")
    assert result.exit_code == 0, result.output
    masks = [SparseMask.load(path) for path in files]
    union = SparseMask.load(tmp_path / "all")
    assert union.ids.tolist() == sorted({*masks[0].ids.tolist(), *masks[1].ids.tolist()})
    assert f"{len(union)} of 83776 elements (union of 2, magnitude and task; " in result.output
    assert call("mask-union", *files, "--density", "0.001", "--output", tmp_path / "cut").exit_code == 0
    assert len(SparseMask.load(tmp_path / "cut")) == 84
    short = ("--rounds", "1", "--local-steps", "1", "--eval-examples", "20")
    assert call("run", *short, "--mask", tmp_path / "cut", "--output", tmp_path / "r").exit_code == 0
    beside = call("mask", "--calibration-texts", 16, "--check", "embedded", "--beside", tmp_path / "all")
    assert re.findall(r"(?m)^\| (\S+(?: mask)?) +\| (\S+) +\| [\d.]+%", beside.output) == [
        ("the mask", "838"), ("all", f"{len(union):,}"),
    ]  # fmt: skip
    again = call("mask-union", *files, "--output", tmp_path / "all")
    assert again.exit_code == 1
    assert "all exists already" in again.output


def test_mask_needs_output_or_check() -> None:
    result = call("mask")
    assert result.exit_code == 1
    assert "give --output FILE to save the mask, or --check TASK" in result.output


def test_mask_check_reports_the_coverage_of_own_data(
    tmp_path: Path, write_jsonl: Callable[[str, list[str]], Path]
) -> None:
    rows = [json.dumps({"text": f"some words {i}", "label": i % 2}) for i in range(12)]
    path = write_jsonl("mine.jsonl", rows)
    own_data = ("--data", path, "--template", "{text} it was", "--labels", "poor,great")
    tokenizer = make_byte_tokenizer()
    make_model(vocabulary=len(tokenizer)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model = ("--model", tmp_path / "m", "--method", "weight-magnitude", "--density", "0.01")
    result = call("mask", *model, *own_data, "--check", "mine")
    assert result.exit_code == 0, result.output
    assert "mine: holds " in result.output
    result = call("mask", *model, *own_data, "--check", "sst2")
    assert "with your own data the only task is 'mine', their name; got 'sst2'" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lora-fedzo"], "lora-fedzo needs no mask file: its elements follow from the settings"),
        (["--model", "m", "--method", "task-mask"], "task-mask chooses its elements on a task's examples; give --task"),
    ],
    ids=str,
)
def test_mask_rejects_settings_that_give_no_mask_file(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = call("mask", *arguments, "--output", tmp_path / "x")
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("full-fedzo", "full-fedzo differs from random-mask in more than its mask"),
        ("meerkat-vp", "meerkat-vp differs from random-mask in more than its mask"),
        ("fedavg", "fedavg differs from random-mask in more than its mask"),
        ("random-mask", "which random-mask uses anyway"),
    ],
)
def test_compare_random_only_compares_masks(method: str, message: str, tmp_path: Path) -> None:
    result = call("run", "--compare-random", "--method", method, "--output", tmp_path / "r")
    assert result.exit_code == 1
    assert "Error: --compare-random compares " in result.output
    assert message in result.output


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compare_random_is_refused_where_rounding_is_larger_than_its_differences(dtype: str, tmp_path: Path) -> None:
    result = call("run", "--compare-random", "--dtype", dtype, "--output", tmp_path / "r")
    assert result.exit_code == 1
    assert "Error: --compare-random needs --dtype float32" in result.output
    assert not (tmp_path / "r").exists()


def test_eval_examples_are_the_same_stratified_sample_for_all_methods_of_a_seed() -> None:
    def sample(**settings: object) -> list[str]:
        _, _, rows = read_rows(make_config({"eval_examples": 60, **settings}))
        assert abs(sum(row["label"] for row in rows) - 30) <= 1
        return [row["review"] for row in rows]

    complete = [row["review"] for row in embedded.rows("validation")]
    chosen = sample(method="meerkat")
    assert chosen == sample(method="random-mask", rounds=3) == [text for text in complete if text in set(chosen)]
    assert chosen != complete[:60]
    assert chosen != sample(seed=1)


def test_queries_with_a_loss_that_is_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    """At this eps, float16 overflows in some of the forward passes."""
    result = call("run", *SMALL, "--rounds", "3", "--dtype", "float16", "--eps", "140", "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    rounds = read_ledger(tmp_path / "r" / "ledger.jsonl").rounds
    skipped = [sum(math.isnan(g) for scalars in line.clients.values() for g in scalars) for line in rounds]
    count = sum(skipped)
    assert 0 < count < 3 * 4 * 2
    lines = metrics_of(tmp_path / "r")
    assert [line.get("skipped", 0) for line in lines[1:-1]] == skipped
    assert lines[-1]["summary"]["queries_skipped"] == count
    assert f"skipped         {count} queries, whose loss was not finite" in result.output
    assert "the same bits as at the end of the run" in call("replay", tmp_path / "r").output


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_perturbation_that_is_rounded_away_is_reported(tmp_path: Path, dtype: str) -> None:
    settings = (*SMALL, "--rounds", "1", "--dtype", dtype)
    result = call("run", *settings, "--eps", "1e-4", "--output", tmp_path / "some")
    share = re.search(
        rf"{dtype}: the perturbation leaves (\S+)% of the masked elements unchanged at eps 0.0001\n", result.output
    )
    assert share is not None
    assert 5 < float(share[1]) < 95
    result = call("run", *settings, "--eps", "1e-12", "--output", tmp_path / "none")
    assert result.exit_code == 1
    assert "the perturbation leaves 100.0% of the masked elements unchanged at eps 1e-12" in result.output
    assert not (tmp_path / "none").exists()
