"""What a run on free text writes and shows of its scores: metrics, summary, report, card and experiments."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from meerkat_engine.bench.experiments.experiment import Results
from meerkat_engine.bench.experiments.finished import FinishedRun
from meerkat_engine.bench.experiments.local_steps import LocalSteps
from meerkat_engine.bench.experiments.selection import Selection
from meerkat_engine.bench.experiments.sparsity import Sparsity
from meerkat_engine.engine.errors import RunError
from meerkat_engine.fed.run.metrics import check_metrics_line
from meerkat_engine.fed.run.summary import check_summary
from meerkat_engine.fed.run.terminal import show_run

from helpers.command import call, metrics_of, summary_of
from helpers.models import make_byte_tokenizer, make_model

pytest.importorskip("torchmetrics")

GENERATED = ["exact_match", "token_f1", "rouge_l"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and rows of free text."""
    path = tmp_path_factory.mktemp("text")
    make_model(vocabulary=272).save_pretrained(path / "model")  # type: ignore[operator]
    make_byte_tokenizer().save_pretrained(path / "model")
    words = ["red", "tan", "sky", "jet"]
    rows = [{"prompt": f"Say {word}.", "completion": f" {word}"} for word in words * 10]
    (path / "say.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} and so on"}) + "\n" for i in range(9)))
    return path


def arguments(directory: Path, output: Path) -> list[Any]:
    return ["run", "--model", directory / "model", "--data", directory / "say.jsonl", "--calibration",
            directory / "text.jsonl", "--calibration-texts", "8", "--density", "0.05", "--lr", "0.01", "--rounds", "3",
            "--local-steps", "2", "--clients", "2", "--batch-size", "4", "--eval-every", "2", "--metrics",
            "exact-match,token-f1,rouge-l", "--max-new-tokens", "5", "--output", output]  # fmt: skip


@pytest.fixture(scope="module")
def run(directory: Path) -> tuple[Path, str]:
    """A run, compared with a random mask, and its output."""
    result = call(*arguments(directory, directory / "r"), "--compare-random")
    assert result.exit_code == 0, result.output
    return directory / "r", result.output


@pytest.fixture(scope="module")
def classification(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded classification task."""
    path: Path = tmp_path_factory.mktemp("classes") / "c"
    result = call("run", "--rounds", "1", "--local-steps", "1", "--eval-examples", "40", "--method", "random-mask",
                  "--output", path)  # fmt: skip
    assert result.exit_code == 0, result.output
    return path


def test_lines_and_summary_have_every_score_under_its_name(run: tuple[Path, str]) -> None:
    path, _ = run
    *lines, last = metrics_of(path)
    scores = ["validation_loss", "perplexity", *GENERATED]
    assert list(lines[0])[:6] == ["loss", *scores]
    for line in lines:
        evaluated = line["round"] in (0, 2, 3)
        assert [name for name in (*scores, "accuracy", "macro_f1") if name in line] == (scores if evaluated else [])
    summary = last["summary"]
    check_summary(summary, "here")
    for name in scores:
        assert summary[f"{name}_before"] == lines[0][name]
        assert summary[f"{name}_after"] == lines[3][name]
    assert summary["validation_tokens"] == 8 * len(" red\n")  # with the end of the text
    assert not any(name.startswith(("accuracy", "macro_f1")) for name in summary)


def test_the_terminal_shows_loss_perplexity_and_metrics(run: tuple[Path, str]) -> None:
    path, output = run
    s = summary_of(path)
    assert (
        f"held-out loss   {s['validation_loss_before']:.4f} before, {s['validation_loss_after']:.4f} after "
        f"(8 held-out examples, 40 answer tokens); perplexity {s['perplexity_before']:.2f}, "
        f"{s['perplexity_after']:.2f}\n"
    ) in output
    values = [f"{s[f'{name}_before']:.4f}, {s[f'{name}_after']:.4f}" for name in GENERATED]
    assert f"generated       exact match {values[0]}; token F1 {values[1]}; ROUGE-L {values[2]}\n" in output
    random = summary_of(path / "random-mask")["validation_loss_after"]
    assert f"\nheld-out loss after   meerkat {s['validation_loss_after']:.4f}   random {random:.4f}   (both" in output
    assert "accuracy" not in output


def test_a_ruined_model_is_shown_as_not_finite(run: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    ruined = {"validation_loss_after": None, "perplexity_after": None, "nonfinite_before": 0, "nonfinite_after": 3}
    check_summary(summary_of(run[0]) | ruined, "here")
    show_run(run[0], lambda report, log: summary_of(run[0]) | ruined)
    shown = capsys.readouterr().out
    assert " before, not finite after (8 held-out examples" in shown
    assert "3 after: their scores were not finite; the mean has no value" in shown


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"perplexity"', '"perplexitx"'),
        ('"rouge_l"', '"rouge_x"'),
        ('"exact_match": 0.0', '"exact_match": null'),
        ('"exact_match": 0.0', '"exact_match": 0.0, "accuracy": 0.5'),
        ('"validation_loss"', '"validation_losx"'),
    ],
)
@pytest.mark.parametrize("number", [0, 2])
def test_a_run_whose_scores_are_damaged_is_not_resumed(
    run: tuple[Path, str], tmp_path: Path, old: str, new: str, number: int
) -> None:
    path = tmp_path / "r"
    shutil.copytree(run[0], path, ignore=shutil.ignore_patterns("random-mask"))
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]
    assert old in lines[number]
    lines[number] = lines[number].replace(old, new)
    (path / "metrics.jsonl").write_text("".join(lines))
    result = call("run", "--resume", path)
    assert result.exit_code == 1
    # a first line without a score of generated text is noticed at the next line that has one
    where = 3 if (number, old) == (0, '"rouge_l"') else number + 1
    assert f"metrics.jsonl, line {where}: " in result.output
    assert "is not a number, or there is a score that the run does not have; nothing was changed" in result.output


def test_a_run_that_was_stopped_ends_with_the_same_scores(run: tuple[Path, str], tmp_path: Path) -> None:
    path = tmp_path / "r"
    shutil.copytree(run[0], path, ignore=shutil.ignore_patterns("random-mask"))
    for name, kept in (("metrics.jsonl", 2), ("ledger.jsonl", 2), ("gradip.jsonl", 1)):
        lines = (path / name).read_text().splitlines(keepends=True)
        (path / name).write_text("".join(lines[:kept]))
    (path / "snapshot.safetensors").unlink(missing_ok=True)
    result = call("run", "--resume", path)
    assert result.exit_code == 0, result.output
    times = ("seconds", "seconds_in_steps", "seconds_in_forwards", "seconds_per_step", "forward_share_of_step")
    for own, first in zip(metrics_of(path), metrics_of(run[0]), strict=True):
        own, first = own.get("summary", own), first.get("summary", first)
        assert {k: v for k, v in own.items() if k not in times} == {k: v for k, v in first.items() if k not in times}


@pytest.mark.parametrize("name", ["validation_tokens", "perplexity_before", "rouge_l_after", "validation_loss_after"])
def test_a_summary_without_one_of_them_is_damaged(run: tuple[Path, str], name: str) -> None:
    summary = summary_of(run[0])
    with pytest.raises(RunError, match=f"here: {name} is missing in the summary"):
        check_summary({key: value for key, value in summary.items() if key != name}, "here")
    with pytest.raises(RunError, match=f"here: {name} is missing in the summary, or of another kind"):
        check_summary(summary | {name: "1"}, "here")


def test_an_evaluation_with_scores_that_are_not_finite_can_be_read_again(run: tuple[Path, str]) -> None:
    line = metrics_of(run[0])[0] | {"loss": None, "validation_loss": None, "perplexity": None, "nonfinite": 2}
    check_metrics_line(line, None, "here", ["perplexity", *GENERATED])


def test_a_report_of_runs_of_both_kinds_keeps_them_apart(
    run: tuple[Path, str], classification: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from meerkat_engine.fed.report import page

    drawn: list[dict[str, list[Any]]] = []
    draw = page.draw_curves
    monkeypatch.setattr(page, "draw_curves", lambda panels, *a, **k: drawn.append(panels) or draw(panels, *a, **k))
    result = call("report", run[0], classification, "--output", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "r.html").read_text()
    by_round, by_bytes = drawn
    assert {label: [c.name for c in curves] for label, curves in by_round.items()} == {
        "accuracy": ["c"], "macro-F1": ["c"], "held-out loss": ["r"], "perplexity": ["r"], "exact match": ["r"],
        "token F1": ["r"], "ROUGE-L": ["r"], "training loss": ["r", "c"],
    }  # fmt: skip
    assert {label: [c.name for c in curves] for label, curves in by_bytes.items()} == {
        "accuracy": ["c"], "held-out loss": ["r"]
    }  # fmt: skip
    assert by_round["held-out loss"][0].x == [0, 2, 3]
    s = summary_of(run[0])
    row = text[text.index("held-out loss, before → after") :][:400]
    assert f"{s['validation_loss_before']:.4f} → {s['validation_loss_after']:.4f}" in row
    assert "held-out answer tokens" in text
    assert "Examples by label" in text  # of the classification run
    assert "<h3>Examples</h3>" in text


def test_the_card_has_the_scores_of_the_task(run: tuple[Path, str], tmp_path: Path) -> None:
    assert call("replay", run[0], "--output", tmp_path / "saved").exit_code == 0
    card, s = ModelCard.load(tmp_path / "saved" / "README.md"), summary_of(run[0])
    change = f"{s['validation_loss_before']:.4f} before, {s['validation_loss_after']:.4f} after"
    assert f"| held-out loss | {change} |" in card.text
    assert "accuracy" not in card.text
    results = {(r.task_type, r.metric_type, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert results["text-generation", "loss", "held-out loss"] == s["validation_loss_after"]
    assert results["text-generation", "perplexity", "perplexity"] == s["perplexity_after"]
    assert results["text-generation", "rouge", "ROUGE-L"] == s["rouge_l_after"]
    command = card.text.split("```sh\n")[1].splitlines()[0]
    assert "--data " in command
    assert "None" not in command


def test_experiments_show_the_held_out_loss(run: tuple[Path, str], tmp_path: Path) -> None:
    finished = FinishedRun.in_directory(run[0])
    s = summary_of(run[0])
    assert finished.before == s["validation_loss_before"]
    assert finished.curve == [(line["round"], line["validation_loss"]) for line in finished.lines if line["round"] != 1]
    after = f"{s['validation_loss_after']:.3f}"
    arms = {f"{partition}, u = {u:g}": [finished] for partition in ("iid", "Dirichlet 0.5") for u in
            (1e-2, 1e-3, 1e-4, 1e-5)}  # fmt: skip
    tables = [(Sparsity(), Results(arms=arms, measured=None))]
    drifted = dataclasses.replace(finished, extra=0.5)
    arms = {"IID, T = 1": [drifted], "IID, T = 10": [drifted], "Dirichlet 0.1, T = 10": [drifted]}
    tables.append((LocalSteps(), Results(arms=arms, measured=None)))
    for experiment, results in tables:
        table = experiment.table(results)
        assert "held-out loss" in table
        assert "accuracy" not in table
        assert after in table
        experiment.draw(results, tmp_path / f"{experiment.name}.png")


def test_experiments_on_tasks_of_both_kinds_name_both(run: tuple[Path, str], classification: Path) -> None:
    arms = {
        "classes; mixed; meerkat": [FinishedRun.in_directory(classification)],
        "say; mixed; meerkat": [FinishedRun.in_directory(run[0])],
    }
    table = Selection().table(Results(arms=arms, measured=None))
    assert "accuracy or held-out loss after" in table
    assert f"{summary_of(classification)['accuracy_after']:.3f}" in table
    assert f"{summary_of(run[0])['validation_loss_after']:.3f}" in table
