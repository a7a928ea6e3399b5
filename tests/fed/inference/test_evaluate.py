"""``meerkat-engine evaluate``: a run's own numbers, other examples, other models, and users' metrics."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meerkat_engine.engine.lm import embedded

from helpers.command import call, summary_of


def scores(output: Path, *arguments: object) -> Any:
    """The file of an evaluation."""
    result = call("evaluate", *arguments, "--output", output)
    assert result.exit_code == 0, result.output
    return json.loads(output.read_text())


def of_summary(run: Path, names: list[str]) -> dict[str, dict[str, float]]:
    summary = summary_of(run)
    return {version: {name: summary[f"{name}_{version}"] for name in names} for version in ("before", "after")}


def test_a_run_has_the_numbers_of_its_summary(classified: Path, tmp_path: Path) -> None:
    found = scores(tmp_path / "s.json", classified)
    assert found["scores"] == of_summary(classified, ["validation_loss", "accuracy", "macro_f1"])
    assert (found["examples"], found["round"], found["task"]) == (40, 2, "embedded")


def test_a_run_on_free_text_has_the_numbers_of_its_summary(answered: Path, tmp_path: Path) -> None:
    found = scores(tmp_path / "s.json", answered)
    assert found["scores"] == of_summary(answered, ["validation_loss", "perplexity"])
    text = call("evaluate", answered).output
    assert "held-out loss" in text
    assert f"{found['scores']['after']['perplexity']:.2f}" in text


def test_a_checkpoint_has_the_numbers_of_its_run(classified: Path, tmp_path: Path) -> None:
    assert call("replay", classified, "--output", tmp_path / "critic").exit_code == 0
    found = scores(tmp_path / "s.json", tmp_path / "critic", "--task", "embedded", "--eval-examples", 40)
    after = of_summary(classified, ["accuracy", "macro_f1"])["after"]
    assert {name: found["scores"]["model"][name] for name in after} == after
    assert found["round"] is None


def test_all_rows_of_a_file_are_evaluated(classified: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in embedded.rows("train")[:50]))
    assert scores(tmp_path / "a.json", classified, "--data", rows)["examples"] == 50
    found = scores(tmp_path / "b.json", "embedded", "--task", "embedded", "--data", rows)
    assert found["examples"] == 50
    assert found["scores"]["model"] == scores(tmp_path / "c.json", classified, "--data", rows)["scores"]["before"]
    assert scores(tmp_path / "d.json", classified, "--data", rows, "--eval-examples", 20)["examples"] == 20


def test_a_run_on_another_task(classified: Path, tmp_path: Path) -> None:
    found = scores(tmp_path / "a.json", classified, "--task", "embedded-topic", "--eval-examples", 30)
    model = scores(tmp_path / "b.json", "embedded", "--task", "embedded-topic", "--eval-examples", 30)
    assert found["scores"]["before"] == model["scores"]["model"]
    assert found["scores"]["after"] != found["scores"]["before"]


def test_a_dataset_of_a_directory(faq: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(faq.read_text())
    found = scores(tmp_path / "a.json", "embedded", "--dataset", tmp_path / "data")
    assert found["examples"] == 20
    assert found["scores"] == scores(tmp_path / "b.json", "embedded", "--data", faq)["scores"]


def test_a_function_of_the_user(answered: Path, faq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics.py").write_text(
        "def same(predictions, references):\n"
        "    return sum(p in r for p, r in zip(predictions, references)) / len(predictions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    call("predict", answered, "--data", faq, "--output", "p.jsonl", "--max-new-tokens", 4)
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    arguments = (answered, "--data", faq, "--metric-function", "my_metrics:same", "--max-new-tokens", 4)
    found = scores(tmp_path / "s.json", *arguments)["scores"]
    for version in ("before", "after"):
        same = [row[f"predicted_{version}"] == row["completion"].strip() for row in rows]
        assert found[version]["same"] == sum(same) / len(same)
    assert "\nsame " in call("evaluate", *arguments).output


def test_metrics_of_generated_answers(answered: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    found = scores(tmp_path / "s.json", answered, "--metrics", "exact-match,token-f1", "--max-new-tokens", 4)
    assert list(found["scores"]["after"]) == ["validation_loss", "perplexity", "exact_match", "token_f1"]
    assert all(0 <= found["scores"]["after"][name] <= 1 for name in ("exact_match", "token_f1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embedded"], "embedded is no run, so it has no held-out examples; give --task"),
        (["embedded", "--data", "a", "--dataset", "b"], "give --dataset NAME or --data FILE, not both"),
        (["embedded", "--task", "embedded", "--metrics", "exact-match"], "chooses between label words"),
        (["embedded", "--task", "embedded", "--metric-function", "math:fsum"], "--metric-function compares generated"),
        (["embedded", "--task", "embedded", "--metric-function", "math"], "must be MODULE:FUNCTION"),
        (["embedded", "--task", "embedded", "--metric-function", "no_such:f"], "No module named 'no_such'"),
        (["embedded", "--task", "embedded", "--metric-function", "math:f"], "no attribute 'f'"),
        (["embedded", "--task", "embedded", "--metric-function", "math:pi"], "is no function, but float"),
        (["embedded", "--task", "nothing"], "unknown task 'nothing'"),
        (["embedded", "--task", "embedded", "--metrics", "blue"], "no metric 'blue'"),
    ],
)
def test_bad_input(arguments: list[str], message: str, fails: Callable[..., str]) -> None:
    assert message in fails("evaluate", *arguments)


def test_a_run_on_own_data_has_only_that_task(answered: Path, fails: Callable[..., str]) -> None:
    assert "with your own data the only task is 'faq'" in fails("evaluate", answered, "--task", "sst2")
    assert "which has its own seed; leave --seed out" in fails("evaluate", answered, "--seed", 3)


def test_nothing_is_overwritten(classified: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "s.json").write_text("mine")
    assert "exists already" in fails("evaluate", classified, "--output", tmp_path / "s.json")
    assert (tmp_path / "s.json").read_text() == "mine"
