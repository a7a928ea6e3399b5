"""The embedded task is a fair test: balanced, with held-out examples, in a wording that pre-training never uses."""

import hashlib
import json
from pathlib import Path

import torch
from click.testing import CliRunner

from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.embedded import corpus
from meerkat_engine.engine.lm.embedded.pretrain import main, make_tokenizer
from meerkat_engine.engine.lm.embedded.remarks import main as write_remarks
from meerkat_engine.engine.lm.evaluation import evaluate
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.row_files import read_rows
from meerkat_engine.engine.lm.text_loss import language_model_loss

from helpers.command import call


def test_splits_are_disjoint_and_balanced() -> None:
    train, validation = embedded.rows("train"), embedded.rows("validation")
    assert not {row["review"] for row in train} & {row["review"] for row in validation}
    for rows in (train, validation):
        assert sum(row["label"] for row in rows) == len(rows) / 2


def test_default_device_of_torch_does_not_matter() -> None:
    expected = list(corpus.texts(20, 3))
    torch.set_default_device("meta")
    try:
        assert list(corpus.texts(20, 3)) == expected
        assert {p.device.type for p in embedded.load().model.parameters()} == {"cpu"}
    finally:
        torch.set_default_device(None)


def test_pretraining_text_never_contains_the_task() -> None:
    for text in corpus.texts(2000, 1):
        assert "so my answer is" not in text
        for word in ("yes", "no"):
            if word in text.split():  # only texts without a review contain these words
                assert not set(text.split()) & {"film", "book", "meal", "hotel", "phone", "game"}


def test_tokenizer_has_every_word() -> None:
    tokenizer = embedded.load().tokenizer
    for text in [
        *corpus.texts(300, 5),
        *(embedded.TASKS[embedded.NAME].prompt(row) for row in embedded.rows("validation")),
    ]:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_the_full_stop_ends_an_answer_and_is_a_word_of_reviews_as_before() -> None:
    lm, made = embedded.load(), make_tokenizer()
    assert lm.tokenizer.eos_token == made.eos_token == "."
    assert lm.model.config.eos_token_id == lm.tokenizer.eos_token_id == lm.tokenizer.get_vocab()["."]
    assert lm.tokenizer.get_vocab() == made.get_vocab()
    for text in corpus.texts(100, 7):
        words = ["<s>", *text.split()]
        assert lm.tokenizer(text)["input_ids"] == made(text)["input_ids"] == made.convert_tokens_to_ids(words)


def test_pretrained_model_predicts_its_text_but_not_the_task() -> None:
    lm = embedded.load()
    ids = lm.tokenizer(corpus.texts(64, 9), padding=True, return_tensors="pt")
    with torch.no_grad():
        loss = language_model_loss(lm.model, {k: ids[k] for k in ("input_ids", "attention_mask")}).item()
    assert loss < 1.1  # ln(149) = 5.0 is a uniform guess
    data = EncodedTask(embedded.TASKS[embedded.NAME], embedded.rows("validation"), lm.tokenizer, 128, "validation")
    assert 0.4 < evaluate(lm.model, data).scores["accuracy"] < 0.6


def test_corpus_is_the_same_on_every_machine() -> None:
    text = "\n".join([*corpus.texts(500, 1), *(str(row["review"]) for row in embedded.rows("validation"))])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "2261358c1ed7019a"


def test_pretraining_script_reduces_the_loss(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "out"), "--steps", "40"])
    assert result.exit_code == 0, result.output
    assert 1.0 < float(result.output.split("loss ")[1].split()[0]) < 4.7  # ln(149) = 5.0 is a uniform guess


EXAMPLES = Path(__file__).parents[3] / "examples" / "data"


def test_the_files_of_free_text_are_what_the_command_writes(tmp_path: Path) -> None:
    result = CliRunner().invoke(write_remarks, [str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    written = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in written] == ["remarks-held-out.jsonl", "remarks.jsonl"]
    for path in written:
        assert path.read_bytes() == (EXAMPLES / path.name).read_bytes()
    again = CliRunner().invoke(write_remarks, [str(tmp_path / "new"), "--seed", "2"])
    assert again.exit_code == 1
    assert "remarks.jsonl exists; nothing is overwritten" in again.output
    assert written[1].read_bytes() == (EXAMPLES / "remarks.jsonl").read_bytes()


def test_free_text_has_one_answer_to_each_prompt_and_no_prompt_twice() -> None:
    train, held_out = (read_rows(EXAMPLES / f"{name}.jsonl").rows for name in ("remarks", "remarks-held-out"))
    prompts = [row["prompt"] for row in (*train, *held_out)]
    assert len(set(prompts)) == len(prompts) == 800
    tokenizer = embedded.load().tokenizer
    for rows in (train, held_out):
        assert sum("should try" in row["completion"] for row in rows) == len(rows) / 2
        for row in rows:
            thing = row["completion"].split()[-1]
            named = set(row["prompt"].split()) & {"film", "book", "meal", "hotel", "phone", "game"}
            assert named == {thing}
            assert tokenizer.unk_token_id not in tokenizer(row["prompt"] + row["completion"])["input_ids"]


def test_free_text_is_not_known_and_learned_in_a_few_rounds(tmp_path: Path) -> None:
    data = ("--data", EXAMPLES / "remarks.jsonl", "--validation", EXAMPLES / "remarks-held-out.jsonl")
    settings = ("--rounds", "20", "--lr", "0.02", "--eval-every", "20", "--metrics", "exact-match")
    result = call("run", "--model", "embedded", *data, *settings, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["summary"]
    assert summary["validation_loss_before"] > 1.5
    assert summary["validation_loss_after"] < 0.5
    assert summary["exact_match_before"] == 0
    assert summary["exact_match_after"] > 0.2
