"""Runs of models whose scores or losses are not finite."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from meerkat_engine.bench.experiments.experiment import Results
from meerkat_engine.bench.experiments.finished import FinishedRun
from meerkat_engine.engine.errors import RunError
from meerkat_engine.engine.lm.scores import scores_in
from meerkat_engine.fed.run.metrics import check_metrics_line

from helpers.command import call, metrics_of, summary_of
from helpers.models import make_model, make_tokenizer

NORM = "layers.0.input_layernorm"
WORDS = "good bad film broken It was terrible great"


@pytest.fixture
def run(tmp_path: Path, write_jsonl: Callable[[str, list[str]], Path]) -> Callable[..., list[str | Path]]:
    """Arguments of a run on a model that gives NaN for every text with one of the words in ``nan_for``."""

    def arguments(*nan_for: str) -> list[str | Path]:
        tokenizer, model = make_tokenizer(WORDS), make_model()
        embedding, norm = (model.get_parameter(f"model.{name}.weight") for name in ("embed_tokens", NORM))
        embedding.data[:, 31], norm.data[31] = 0.0, 3e38  # finite; the norm overflows
        for word in nan_for:
            embedding.data[tokenizer.convert_tokens_to_ids(word), 31] = 1.0
        model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
        tokenizer.save_pretrained(tmp_path / "model")
        rows = [{"text": "good film" if i % 2 else "bad film", "label": i % 2} for i in range(32)]
        train = write_jsonl("train.jsonl", [json.dumps(row) for row in rows])
        broken = [{"text": "broken film", "label": i % 2} for i in range(6)]
        held_out = write_jsonl("held_out.jsonl", [json.dumps(row) for row in rows[:4] + broken])
        return ["run", "--model", tmp_path / "model", "--data", train, "--validation", held_out, "--template",
                "{text} It was", "--labels", "terrible,great", "--method", "random-mask", "--density", "0.05",
                "--rounds", "2", "--local-steps", "2", "--batch-size", "4", "--clients", "2", "--lr", "0"]  # fmt: skip

    return arguments


def test_examples_without_finite_scores_are_counted_and_told(
    run: Callable[..., list[str | Path]], tmp_path: Path
) -> None:
    result = call(*run("broken"), "--eval-every", "1", "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    summary = summary_of(tmp_path / "r")
    assert summary["nonfinite_before"] == summary["nonfinite_after"] == 6
    assert summary["accuracy_after"] <= 0.4
    assert "6 of 10 held-out examples have scores that are not finite; they count as wrong\n" in result.output
    assert "not scored      6 held-out examples before, 6 after" in result.output
    assert [line["nonfinite"] for line in metrics_of(tmp_path / "r")[:-1]] == [6, 6, 6]
    results = Results(arms={"arm": [FinishedRun.in_directory(tmp_path / "r")]}, measured=None)
    assert results.not_scored().endswith("arm (run 1): 6 of 10.")
    assert call("report", tmp_path / "r", "--output", tmp_path / "page.html").exit_code == 0
    assert "held-out examples without finite scores, before → after" in (tmp_path / "page.html").read_text()
    assert call("replay", tmp_path / "r", "--output", tmp_path / "saved").exit_code == 0
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| not scored | 6 held-out examples before, 6 after: their scores were not finite |" in card


def test_a_run_that_trained_nothing_is_an_error_also_when_resumed(
    run: Callable[..., list[str | Path]], tmp_path: Path
) -> None:
    result = call(*run("film"), "--output", tmp_path / "r")
    for attempt in (result, call("run", "--resume", tmp_path / "r")):
        assert attempt.exit_code == 1
        assert attempt.exception is None or isinstance(attempt.exception, SystemExit)
        assert "Error: all 8 local steps of the run were skipped, because no loss was finite: nothing was trained" in (
            attempt.output
        )
    assert not any("summary" in line for line in metrics_of(tmp_path / "r"))


def test_a_run_with_finite_scores_says_nothing_of_it(run: Callable[..., list[str | Path]], tmp_path: Path) -> None:
    result = call(*run(), "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "not finite" not in result.output
    assert "not scored" not in result.output
    assert not any("nonfinite" in key for key in summary_of(tmp_path / "r"))


@pytest.mark.parametrize("count", [-1, 1.5, "3", True])
def test_a_count_that_is_no_number_of_examples_is_damage(count: object) -> None:
    line = {"round": 0, "steps": 0, "bytes_up": 0, "bytes_down": 0, "accuracy": 0.5, "macro_f1": 0.5,
            "validation_loss": None, "seconds": 0, "seconds_in_steps": 0, "seconds_in_forwards": 0}  # fmt: skip
    check_metrics_line(line, None, "here", scores_in(line))
    with pytest.raises(RunError, match=r"nonfinite is .*, not a number of examples"):
        check_metrics_line(line | {"nonfinite": count}, None, "here", scores_in(line))
