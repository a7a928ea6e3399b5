"""Runs on free text, through the command line: methods, kinds of files, partitions; replays have the same bits."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meerkat_engine.engine.lm.row_files import LocatedRows
from meerkat_engine.fed import make_config
from meerkat_engine.fed.setup.data import sample_rows

from helpers.command import call, metrics_of, summary_of
from helpers.free_text import CHATML, SHAPES, make_chat_tokenizer
from helpers.models import make_model

SHORT = ["--batch-size", "4", "--clients", "2", "--rounds", "2", "--local-steps", "2", "--density", "0.05",
         "--lr", "0.01", "--max-length", "120", "--calibration-texts", "8"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one token per byte and a chat template."""
    path = tmp_path_factory.mktemp("model")
    make_model(vocabulary=272, positions=128).save_pretrained(path)
    make_chat_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        {"prompt": f"{i} and {i % 7} is", "completion": f" {i + i % 7}", "kind": "odd" if i % 3 else "even"}
        for i in range(40)
    ]


@pytest.fixture
def files(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    """A directory with the rows and with calibration text."""
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} and so on"}) + "\n" for i in range(9)))
    return tmp_path


@pytest.fixture
def run(model: Path, files: Path) -> Callable[..., Any]:
    """Runs the rows with further arguments; the run directory is ``r``."""

    def start(*arguments: Any, data: tuple[Any, ...] = ("--data", files / "sums.jsonl"), output: str = "r") -> Any:
        return call("run", "--model", model, *data, "--calibration", files / "text.jsonl", *SHORT, *arguments,
                    "--output", files / output)  # fmt: skip

    return start


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--method", "meerkat-vp", "--vp-steps", "6", "--vp-initial", "2", "--vp-later", "3", "--vp-null-paths", "3"],
        ["--method", "decomfl"],
        ["--method", "full-fedzo", "--lr", "0.001"],
        ["--method", "task-mask"],
        ["--method", "weight-magnitude"],
        ["--method", "fedavg"],
        ["--method", "lora-fedzo"],
        ["--dp-noise", "1.0"],
        ["--micro-batch-size", "3", "--objective", "language-model-by-example"],
        ["--layout", "padded", "--queries", "2"],
        ["--partition", "dirichlet", "--label-field", "kind", "--alpha", "5"],
    ],
    ids=lambda a: " ".join(a[:2]) or "meerkat",
)
def test_methods_train_on_free_text_and_replay_to_the_same_bits(
    run: Callable[..., Any], files: Path, arguments: list[str]
) -> None:
    pytest.importorskip("peft") if "lora-fedzo" in arguments else None
    pytest.importorskip("dp_accounting") if "--dp-noise" in arguments else None
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    summary = summary_of(files / "r")
    assert summary["validation_loss_before"] != summary["validation_loss_after"]
    assert "sums: prompt and completion; 32 answers of" in result.output
    replayed = call("replay", files / "r")
    assert "the same bits as at the end of the run" in replayed.output, replayed.output


def test_a_run_lowers_the_held_out_loss_and_resumes_to_the_same_bits(run: Callable[..., Any], files: Path) -> None:
    result = run("--rounds", "8", "--local-steps", "5", "--lr", "0.005", "--density", "0.2")
    assert result.exit_code == 0, result.output
    summary = summary_of(files / "r")
    assert summary["validation_loss_after"] < 0.95 * summary["validation_loss_before"]
    for name, lines in (("ledger.jsonl", 5), ("metrics.jsonl", 5), ("gradip.jsonl", 4)):
        content = (files / "r" / name).read_bytes().splitlines(keepends=True)
        (files / "r" / name).write_bytes(b"".join(content[:lines]))
    (files / "r" / "snapshot.safetensors").unlink(missing_ok=True)
    resumed = call("run", "--resume", files / "r")
    assert resumed.exit_code == 0, resumed.output
    assert summary_of(files / "r")["weights"] == summary["weights"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_runs(run: Callable[..., Any], files: Path, shape: str) -> None:
    rows, settings = SHAPES[shape]
    (files / "shape.json").write_text(json.dumps(rows * 6))
    template = ["--template", settings["template"], "--answer", settings["answer"]] if settings else []
    result = run("--method", "random-mask", *template, data=("--data", files / "shape.json"))
    assert result.exit_code == 0, result.output
    assert summary_of(files / "r")["examples_by_client_and_label"] == [[5], [5]]
    assert "client 0: 5 examples\n" in result.output


def test_a_table_gives_the_run_of_the_same_rows_in_json(
    run: Callable[..., Any], files: Path, rows: list[dict[str, Any]]
) -> None:
    with open(files / "sums.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    assert run("--method", "random-mask").exit_code == 0
    assert run("--method", "random-mask", data=("--data", files / "sums.csv"), output="c").exit_code == 0
    assert summary_of(files / "c")["weights"] == summary_of(files / "r")["weights"]


def test_a_data_set_in_the_layout_of_the_hub(
    run: Callable[..., Any], files: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", files / "cache")
    (files / "hub").mkdir()
    for split, part in (("train", rows[:30]), ("test", rows[30:])):
        (files / "hub" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = ("--dataset", files / "hub", "--dataset-validation-split", "test")
    result = run("--method", "random-mask", data=data)
    assert result.exit_code == 0, result.output
    assert summary_of(files / "r")["validation_examples"] == 10
    held_out = run("--method", "random-mask", data=("--dataset", files / "hub"), output="h")
    assert held_out.exit_code == 0, held_out.output
    assert summary_of(files / "h")["validation_examples"] == 6
    wrong = run(data=("--dataset", files / "hub", "--dataset-split", "half"), output="w")
    assert wrong.exit_code == 1
    assert "half" in wrong.output
    revised = run(data=("--dataset", files / "hub", "--dataset-revision", "main"), output="w")
    assert "is a local directory, which has no revisions" in revised.output
    assert not (files / "w").exists()


def test_dolly_has_its_categories_as_natural_clients(run: Callable[..., Any], files: Path) -> None:
    for split in ("train", "validation"):
        path = files / "dolly" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [
            {
                "instruction": f"Say {i}",
                "context": "",
                "response": "" if i == 3 else str(i),
                "category": "qa" if i % 3 else "chat",
            }
            for i in range(18)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = ("--task", "dolly", "--data-dir", files)
    result = run("--method", "random-mask", "--partition", "natural", data=data)
    assert result.exit_code == 0, result.output
    assert "left out, no answer: 1 rows (" in result.output
    assert summary_of(files / "r")["natural_clients"] == ["chat", "qa"]
    assert summary_of(files / "r")["examples_by_client_and_label"] == [[5, 0], [0, 12]]


def test_a_sample_of_the_held_out_rows_has_its_share_of_each_class(rows: list[dict[str, Any]]) -> None:
    located = LocatedRows(
        [{**row, "kind": "rare" if i % 10 == 0 else "usual"} for i, row in enumerate(rows)], [""] * 40
    )
    for seed in range(20):
        config = make_config(
            {"model": "m", "data": "d.jsonl", "label_field": "kind", "eval_examples": 20, "seed": seed}
        )
        sample = sample_rows(config, config.task, located)
        assert [row["kind"] for row in sample].count("rare") == 2


def test_metrics_of_generated_answers_are_in_the_run(run: Callable[..., Any], files: Path) -> None:
    pytest.importorskip("torchmetrics")
    result = run("--method", "random-mask", "--metrics", "exact-match,rouge-l", "--max-new-tokens", "4")
    assert result.exit_code == 0, result.output
    first = metrics_of(files / "r")[0]
    assert {"validation_loss", "perplexity", "exact_match", "rouge_l"} <= first.keys()
    assert {"exact_match_after", "rouge_l_before"} <= summary_of(files / "r").keys()


def test_a_metric_that_cannot_be_computed_is_an_error_before_the_model_is_loaded(
    run: Callable[..., Any], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = run("--metrics", "bleu")
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    missing = run("--metrics", "rouge-l")
    for result, message in ((unknown, "there is no metric 'bleu'"), (missing, "pip install")):
        assert result.exit_code == 1
        assert message in result.output
        assert "loading the model" not in result.output


def test_a_chat_template_file_is_used_and_its_text_is_part_of_the_run(run: Callable[..., Any], files: Path) -> None:
    template = files / "t.jinja"
    template.write_text("> " + CHATML)
    chat = ["--method", "random-mask", "--prompt-format", "chat", "--chat-template", template]
    result = run(*chat)
    assert result.exit_code == 0, result.output
    assert "> <|user|>" in result.output
    template.write_text("? " + CHATML)
    lines = (files / "r" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (files / "r" / "metrics.jsonl").write_text("".join(lines[:-1]))
    resumed = call("run", "--resume", files / "r")
    assert resumed.exit_code == 1
    assert "the examples, or their partition among the clients, have changed" in resumed.output
    missing = run(*chat[:-1], files / "no.jinja", output="m")
    assert "chat_template" in missing.output
    assert "does not exist" in missing.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "a"}',
            "sums.jsonl, line 41: the field 'prompt' is missing; the rows before have prompt and completion",
        ),
        ('{"prompt": "a", "completion": 3}', "sums.jsonl, line 41: field 'completion' must be text, got int"),
    ],
)
def test_a_bad_row_is_an_error_before_a_run_begins(
    run: Callable[..., Any], files: Path, line: str, message: str
) -> None:
    with open(files / "sums.jsonl", "a") as file:
        file.write(line + "\n")
    result = run()
    assert result.exit_code == 1
    assert message in result.output
    assert not (files / "r").exists()


def test_the_embedded_model_takes_other_texts_only_by_name(files: Path) -> None:
    result = call("run", "--data", files / "sums.jsonl", "--output", files / "r")
    assert result.exit_code == 1
    assert "--data and --dataset need --model" in result.output
