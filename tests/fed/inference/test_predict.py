"""``meerkat-engine predict``: probabilities and texts are the model's own, for what users type and keep in files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meerkat_engine.engine.lm import embedded
from meerkat_engine.fed.inference.target import open_target

from helpers.command import call
from helpers.free_text import say

REVIEW = "everyone said the art was quite lazy ."


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def greedy(lm: Any, prompt: str, count: int) -> str:
    """The most likely continuation, by one full forward pass a token."""
    ids = lm.tokenizer(prompt)["input_ids"]
    begin = len(ids)
    with torch.inference_mode():
        for _ in range(count):
            token = int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == lm.tokenizer.eos_token_id:
                break
            ids = [*ids, token]
    return str(lm.tokenizer.decode(ids[begin:], skip_special_tokens=True)).strip()


def test_probabilities_are_those_of_the_model(classified: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"review": REVIEW, "id": 7}])
    result = call("predict", classified, "--data", rows, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    (row,) = lines(tmp_path / "out.jsonl")
    assert (row["review"], row["id"]) == (REVIEW, 7)
    target = open_target(str(classified), {})
    for version, weights in target.versions.items():
        with weights as lm, torch.inference_mode():
            ids = lm.tokenizer(f"{REVIEW} so my answer is", return_tensors="pt")["input_ids"]
            words = [lm.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("no", "yes")]
            expected = lm.model(ids).logits[0, -1, words].double().softmax(-1).tolist()
        found = row[f"predicted_{version}"]
        assert list(found["probabilities"].values()) == pytest.approx(expected, abs=1e-6)
        assert found["label"] == ("no", "yes")[expected[1] > expected[0]]
    assert row["predicted_before"] != row["predicted_after"]


def test_the_most_likely_word_is_marked_before_and_after(classified: Path) -> None:
    result = call("predict", classified, "--text", REVIEW)
    assert result.exit_code == 0, result.output
    *_, prompt, _, header, no, yes = result.output.splitlines()
    assert prompt == f"{REVIEW} so my answer is"
    assert header.split() == ["label", "before", "after"]
    assert no.split()[0] == "no"
    assert f"{no} {yes}".count("*") == 2
    assert max(map(len, result.output.splitlines())) <= 80


def test_predictions_have_the_accuracy_of_the_run(classified: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [dict(row) for row in embedded.rows("validation")])
    call("predict", classified, "--data", rows, "--output", tmp_path / "out.jsonl")
    found = lines(tmp_path / "out.jsonl")
    scores = call("evaluate", classified, "--data", rows, "--output", tmp_path / "scores.json")
    assert scores.exit_code == 0, scores.output
    expected = json.loads((tmp_path / "scores.json").read_text())["scores"]
    for version in ("before", "after"):
        right = sum(("no", "yes").index(row[f"predicted_{version}"]["label"]) == row["label"] for row in found)
        assert right / len(found) == expected[version]["accuracy"]


def test_labels_of_rows_are_not_read(classified: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"review": REVIEW}, {"review": REVIEW, "label": "who knows"}])
    result = call("predict", classified, "--data", rows, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    first, second = lines(tmp_path / "out.jsonl")
    assert first["predicted_after"] == second["predicted_after"]
    assert "most likely  before  after" in result.output


def test_texts_are_those_of_the_model(answered: Path, faq: Path, tmp_path: Path) -> None:
    result = call("predict", answered, "--data", faq, "--output", tmp_path / "out.jsonl", "--max-new-tokens", 5)
    assert result.exit_code == 0, result.output
    assert "20 rows, of which these are the first 3" in result.output
    rows = lines(tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if "predicted" not in k} for row in rows] == lines(faq)
    target = open_target(str(answered), {})
    for version, weights in target.versions.items():
        with weights as lm:
            for row in (rows[0], rows[7]):
                assert row[f"predicted_{version}"] == greedy(lm, row["prompt"], 5)
    assert any(row["predicted_before"] != row["predicted_after"] for row in rows)


def test_a_prompt_alone_is_enough(answered: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "the film was"}, {"prompt": "the film was", "completion": ""}])
    result = call("predict", answered, "--data", rows, "--output", tmp_path / "out.jsonl", "--max-new-tokens", 5)
    assert result.exit_code == 0, result.output
    first, second = lines(tmp_path / "out.jsonl")
    assert first["predicted_after"] == second["predicted_after"]


def test_typed_text_is_the_prompt_of_the_runs_examples(answered: Path) -> None:
    prompt = "the film was dull . my answer is"
    typed = call("predict", answered, "--text", prompt, "--max-new-tokens", 5)
    assert typed.exit_code == 0, typed.output
    assert typed.output == call("predict", answered, "--field", f"prompt={prompt}", "--max-new-tokens", 5).output
    with open_target(str(answered), {}).tuned() as lm:
        assert typed.output.splitlines()[-1].endswith(greedy(lm, prompt, 5))


def test_conversations_end_before_their_last_answer(talked: Path, tmp_path: Path) -> None:
    asked = [say("user", "1?"), say("assistant", "1, no"), say("user", "2?")]
    rows = [{"messages": asked}, {"messages": [*asked, say("assistant", "something else")]}]
    found = call("predict", talked, "--data", write(tmp_path / "rows.jsonl", rows), "--output", tmp_path / "o.jsonl",
                 "--max-new-tokens", 8)  # fmt: skip
    assert found.exit_code == 0, found.output
    first, second = lines(tmp_path / "o.jsonl")
    assert first["predicted_after"] == second["predicted_after"]
    assert found.output.count("<|assistant|>1, no</s>\n<|user|>2?</s>\n<|assistant|>\n") == 2


def test_a_model_without_a_task_continues_text_or_answers_a_user(chat_model: Path) -> None:
    plain = call("predict", "embedded", "--text", "the art was", "--max-new-tokens", 5)
    assert "no task is given: the text is the prompt, as it is" in plain.output
    assert plain.output.splitlines()[-1] == greedy(embedded.load(), "the art was", 5)
    chat = call("predict", chat_model, "--text", "Hi", "--max-new-tokens", 4)
    assert "no task is given: the text is a user's message, in the chat template" in chat.output
    assert "<|user|>Hi</s>\n<|assistant|>" in chat.output
    as_text = call("predict", chat_model, "--text", "Hi", "--max-new-tokens", 4, "--prompt-format", "text")
    assert "\nHi\n" in as_text.output


def test_a_checkpoint_gets_its_task_from_options() -> None:
    task = call("predict", "embedded", "--task", "embedded", "--text", REVIEW)
    own = call("predict", "embedded", "--template", "{t} so my answer is", "--labels", "no,yes", "--text", REVIEW)
    assert "label   model" in task.output
    assert own.output == task.output
    one = call("predict", "embedded", "--template", "{t} so my answer is", "--text", REVIEW)
    assert one.output.splitlines()[-1] == greedy(embedded.load(), f"{REVIEW} so my answer is", 64)
    fields = ("--template", "{t} so my {what} is", "--labels", "no,yes", "--text", REVIEW)
    assert call("predict", "embedded", *fields, "--field", "what=answer").output == task.output


def test_a_long_prompt_is_cut_as_in_training(answered: Path, classified: Path) -> None:
    long = "the film was dull . " * 12 + "my answer is"
    result = call("predict", answered, "--text", long, "--max-new-tokens", 4)
    assert "the prompt was too long, and cut as in training" in result.output
    words = " ".join(long.split()[-22:])  # 23 of the 24 tokens of --max-length, with the one that begins every text
    short = call("predict", answered, "--text", words, "--max-new-tokens", 4).output
    assert result.output.splitlines()[1:] == short.splitlines()
    choice = call("predict", classified, "--text", REVIEW * 40)
    assert "the prompt was too long, and cut as in training" in choice.output
    assert "said so my answer is" in " ".join(choice.output.split())


def test_sampling_depends_on_the_seed(answered: Path) -> None:
    def draw(*arguments: object) -> str:
        result = call("predict", answered, "--text", "the film was", "--temperature", 2, *arguments)
        assert result.exit_code == 0, result.output
        return result.output

    assert draw() == draw("--seed", 0)
    assert draw() != draw("--seed", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --text TEXT, --field NAME=VALUE, or --data FILE"),
        (["--text", "a", "--data", "f.jsonl"], "not both"),
        (["--text", " \n"], "--text is empty"),
        (["--field", "review= "], "every --field is empty"),
        (["--text", "a", "--output", "o.jsonl"], "--output is for the rows of --data"),
        (["--text", "a", "--field", "x=b"], "there is no field 'x' in the prompt; its fields are review"),
        (["--text", "a", "--field", "review=b"], "all are given"),
        (["--text", "a", "--top-p", "0.5"], "--top-p is for drawing tokens"),
        (["--text", "a", "--temperature", "-1"], "temperature must be"),
        (["--text", "a", "--round", "9"], "holds 2 rounds; round 9 was requested"),
        (["--data", "no.jsonl"], "no.jsonl"),
    ],
)
def test_bad_input(arguments: list[str], message: str, classified: Path, fails: Callable[..., str]) -> None:
    assert message in fails("predict", classified, *arguments)


def test_a_template_with_several_fields(fails: Callable[..., str]) -> None:
    template = ("--template", "{a} and {b}")
    message = fails("predict", "embedded", *template, "--text", "x")
    assert "has the fields a, b" in message
    assert "--field NAME=VALUE" in message
    assert "--data FILE" in message
    assert "needs the field 'b' too" in fails("predict", "embedded", *template, "--field", "a=x")


@pytest.mark.parametrize("values", [["=a"], ["a"], ["a=1", "a=2"]])
def test_malformed_fields(values: list[str], classified: Path) -> None:
    result = call("predict", classified, *(part for value in values for part in ("--field", value)))
    assert result.exit_code == 2
    assert "Invalid value for '--field'" in result.output


def test_rows_that_do_not_fit_are_named(classified: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"review": "a"}, {"text": "a"}])
    assert "rows.jsonl, line 2: the prompt needs the field 'review'; found text" in fails(
        "predict", classified, "--data", rows
    )


def test_nothing_is_overwritten_or_hidden(classified: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"review": "a", "predicted_after": 1}])
    assert "exists already" in fails("predict", classified, "--data", rows, "--output", rows)
    assert lines(rows) == [{"review": "a", "predicted_after": 1}]
    message = fails("predict", classified, "--data", rows, "--output", tmp_path / "new.jsonl")
    assert "line 1: the field 'predicted_after' would be replaced" in message
    assert not (tmp_path / "new.jsonl").exists()


def test_a_run_on_files_that_are_gone_takes_named_fields(answered: Path, faq: Path, fails: Callable[..., str]) -> None:
    hidden = faq.rename(faq.with_suffix(".hidden"))
    try:
        assert "give --field prompt=TEXT" in fails("predict", answered, "--text", "a")
        assert call("predict", answered, "--field", "prompt=a film", "--max-new-tokens", 2).exit_code == 0
    finally:
        hidden.rename(faq)
