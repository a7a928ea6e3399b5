"""Runs on the user's own data, and with natural clients, through the command line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.fed.config.run_config import RunConfig, make_config
from meerkat_engine.fed.config.sections import DataConfig, ModelConfig
from meerkat_engine.fed.config.toml import read_toml

from helpers.command import call, summary_of
from helpers.models import make_model, make_tokenizer
from helpers.terminal import run_on_terminal

WORDS = "good bad fine poor film It was terrible great the a sounds All in all, that negative positive"
SHORT = ["--batch-size", "4", "--clients", "2", "--rounds", "1", "--local-steps", "2", "--density", "0.05",
         "--method", "random-mask"]  # fmt: skip
ONLY_OWN = ("validation", "template", "labels", "label_field", "cut", "answer", "dataset_config", "dataset_revision",
            "dataset_split", "dataset_validation_split")  # fmt: skip
OWN = {"template": "{text} It was", "labels": "terrible,great"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer(WORDS).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def films(write_jsonl: Callable[[str, list[str]], Path]) -> Path:
    """A file of 40 examples. Labels are label words; the field ``site`` names two sites of different size."""
    rows = [
        {"text": f"a {'good' if i % 2 else 'bad'} film" + " all" * (i % 5),
         "label": "great" if i % 2 else "terrible", "site": "north" if i % 3 else "south"}
        for i in range(40)
    ]  # fmt: skip
    return write_jsonl("films.jsonl", [json.dumps(row) for row in rows])


@pytest.fixture
def own(model: Path, films: Path) -> list[str | Path]:
    """Arguments of a run on ``films``."""
    return ["run", "--model", model, "--data", films, "--template", OWN["template"], "--labels", OWN["labels"], *SHORT]


def test_a_run_on_own_data(own: list[str | Path], films: Path, tmp_path: Path) -> None:
    result = call(*own, "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "and the task films\n" in result.output
    assert "(8 held-out examples)" in result.output
    assert sum(map(sum, summary_of(tmp_path / "r")["examples_by_client_and_label"])) == 32
    settings = read_toml(tmp_path / "r" / "config.toml")
    assert settings["data"] == str(films)
    assert "task" not in settings
    assert make_config(settings).data.labels == "terrible,great"
    again = call("run", "--config", tmp_path / "r" / "config.toml", "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert summary_of(tmp_path / "again")["weights"] == summary_of(tmp_path / "r")["weights"]
    assert "the same bits as at the end of the run" in call("replay", tmp_path / "r").output
    masked = call("mask", "--config", tmp_path / "r" / "config.toml", "--model", tmp_path / "model",
                  "--output", tmp_path / "m")  # fmt: skip
    assert masked.exit_code == 0, masked.output


def test_a_validation_file_is_used(own: list[str | Path], films: Path, tmp_path: Path) -> None:
    result = call(*own, "--validation", films, "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "(40 held-out examples)" in result.output
    missing = call(*own, "--validation", "no.jsonl", "--output", tmp_path / "s")
    assert "validation 'no.jsonl' does not exist" in missing.output


def test_prompts_that_were_cut_are_counted(own: list[str | Path], tmp_path: Path) -> None:
    result = call(*own, "--max-length", "8", "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    summary = summary_of(tmp_path / "r")
    cut = [summary["truncated_train"], summary["truncated_validation"]]
    assert sum(cut) == 16  # 16 of the 40 prompts have 3 + 2 + 1 tokens and "all" three or four times, more than 8
    assert min(cut) > 0
    assert f"cut to fit      {cut[0]} training examples, {cut[1]} held-out examples (--max-length)\n" in result.output


def test_natural_clients_are_those_of_the_client_field(own: list[str | Path], tmp_path: Path) -> None:
    natural = [*own, "--partition", "natural", "--client-field", "site"]
    result = call(*natural, "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    summary = summary_of(tmp_path / "r")
    counts = summary["examples_by_client_and_label"]
    assert summary["natural_clients"] == ["north", "south"]
    for i, name in enumerate(("north", "south")):
        assert f"client {i} ({name}): {sum(counts[i])} examples, {counts[i]} by label\n" in result.output
    assert sum(counts[0]) > sum(counts[1])
    for arguments, message in [
        (["--clients", "3"], "the data name 2 natural clients, and clients is 3; set --clients 2"),
        (["--batch-size", "20"], "client 1 (south) has 12 examples, fewer than the 20 of a batch"),
        (["--client-field", "ward"], "films.jsonl, line 1: natural clients need the field 'ward'; found ['label'"),
    ]:
        result = call(*natural, *arguments, "--output", tmp_path / "s")
        assert result.exit_code == 1
        assert message in result.output
    assert not (tmp_path / "s").exists()


def test_the_natural_clients_of_vader_are_its_domains(
    model: Path, tmp_path: Path, write_jsonl: Callable[[str, list[str]], Path]
) -> None:
    for domain in ("amazon", "movie", "nyt", "tweets"):
        for split in ("train", "validation"):
            rows = [{"sentence": "a good film", "label": i % 2} for i in range(6 if domain == "nyt" else 5)]
            write_jsonl(f"data/vader_{domain}/{split}.jsonl", [json.dumps(row) for row in rows])
    arguments = ["run", "--model", model, "--task", "vader", "--data-dir", tmp_path / "data", *SHORT,
                 "--partition", "natural"]  # fmt: skip
    result = call(*arguments, "--clients", "4", "--output", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "client 2 (nyt): 6 examples, [3, 3] by label" in result.output
    assert "set --clients 4" in call(*arguments, "--output", tmp_path / "s").output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "sst2"}, "give --task or --data, not both"),
        ({"task": "embedded"}, "give --task or --data, not both"),
        ({"template": None}, "--labels needs --template, the prompt that the label words follow"),
        ({"labels": None}, r"--template needs --labels .* or --answer \(free text\)"),
        ({"answer": "{title}"}, "give --labels .* or --answer for free text, not both"),
        ({"labels": None, "template": None, "answer": "{title}"}, "template and answer go together"),
        ({"labels": None, "template": None, "cut": "text"}, "cut is not for free text"),
        ({"labels": None, "answer": "{title}", "partition": "dirichlet"}, "deals examples by class, .* --label-field"),
        ({"labels": None, "answer": "{title}", "objective": "candidates"}, "objective candidates is for a choice"),
        ({"prompt_format": "chat"}, "prompt_format is for free text"),
        ({"chat_template": "t.jinja"}, "chat_template is for free text"),
        ({"metrics": "rouge-l"}, "metrics compare generated answers"),
        ({"dataset": "org/films"}, "give --data FILE or --dataset NAME, not both"),
        ({"dataset_split": "all"}, "dataset_split does not go with --data FILE"),
        ({"data": None, "dataset": "org/films", "validation": "v.jsonl"}, "validation does not go with --dataset NAME"),
        ({"model": None}, "--data and --dataset need --model"),
        ({"labels": "good"}, "task 'films' needs at least two label words"),
        ({"labels": "good,good"}, "needs different label words"),
        ({"template": "{text It was"}, "fields stand in braces"),
        ({"cut": "title"}, "cut 'title' is not a field of the template"),
        ({"client_field": "site"}, "client_field is for natural clients; add --partition natural"),
        ({"partition": "natural"}, "the task 'films' defines no natural clients; give --client-field"),
        *(
            (
                {"data": None, "template": None, "labels": None, "task": "sst2", name: "x"},
                f"{name} is only for your own data",
            )
            for name in ONLY_OWN
        ),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_together_are_rejected(settings: dict[str, str | None], message: str) -> None:
    given = {"model": "m", "data": "films.jsonl", **OWN, **settings}
    with pytest.raises(ConfigError, match=message):
        make_config({name: value for name, value in given.items() if value is not None})


def test_run_config_rejects_a_task_together_with_own_data() -> None:
    with pytest.raises(ConfigError, match="give --task or --data, not both"):
        RunConfig(model=ModelConfig(source="m"), data=DataConfig(task="sst2", file=Path("films.jsonl"), **OWN))


def test_the_embedded_task_has_no_natural_clients() -> None:
    with pytest.raises(ConfigError, match="the task 'embedded' defines no natural clients"):
        make_config({"partition": "natural"})


@pytest.mark.parametrize("half", ["\\ud83d", "\\udc00"])
def test_half_an_emoji_is_an_error_before_a_run_begins(
    own: list[str | Path], films: Path, tmp_path: Path, write_jsonl: Callable[[str, list[str]], Path], half: str
) -> None:
    row = films.read_text().splitlines()[0]
    text, site = row.replace("a bad", half), row.replace("south", half)
    natural = ["--partition", "natural", "--client-field", "site"]
    for line, options in ((text, []), (site, natural)):
        broken = write_jsonl("broken.jsonl", [line, *films.read_text().splitlines()])
        result = call(*own, "--data", broken, *options, "--output", tmp_path / "r")
        assert result.exit_code == 1
        assert "broken.jsonl, line 1: field" in result.output
        assert "has half of a surrogate pair" in result.output
        assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--max-length", "films, train: the longest prompt and answer have 68 tokens, and the model has 64 positions; "
                         "give --max-length 64"),
        ("--calibration-length", "the longest text has 100 tokens, and the model has 64 positions; "
                                 "give --calibration-length 64"),
    ],
)  # fmt: skip
def test_texts_beyond_the_positions_of_the_model_are_errors_that_name_the_option(
    own: list[str | Path], films: Path, tmp_path: Path, write_jsonl: Callable[[str, list[str]], Path],
    option: str, message: str,
) -> None:  # fmt: skip
    make_model("gpt2").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    if option == "--max-length":
        films.write_text(films.read_text() + json.dumps({"text": "film " * 65, "label": 0, "site": "south"}) + "\n")
    texts = write_jsonl("texts.jsonl", [json.dumps({"text": "a good film " * 40})])
    arguments = [*own, "--calibration", texts, "--method", "meerkat", "--output", tmp_path / "r"]
    result = call(*arguments, *(["--calibration-length", "100"] if option != "--max-length" else []))
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "r").exists()
    result = call(*arguments, "--calibration-length", "64", "--max-length", "64")
    assert result.exit_code == 0, result.output


def test_names_outside_the_encoding_of_the_console_are_escaped(
    own: list[str | Path], films: Path, tmp_path: Path
) -> None:
    films.write_text(films.read_text().replace('"south"', '"s\u00fcd \U0001f600"'), encoding="utf-8")
    natural = ["--partition", "natural", "--client-field", "site", "--output", str(tmp_path / "s\u00fcd")]
    text = run_on_terminal(*map(str, own), *natural, PYTHONIOENCODING="ascii")
    assert r"client 1 (s\xfcd \U0001f600): 12 examples" in text
    assert summary_of(tmp_path / "s\u00fcd")["natural_clients"] == ["north", "s\u00fcd \U0001f600"]


def test_an_argument_that_is_no_text_is_an_error(own: list[str | Path]) -> None:
    command = [sys.executable, "-m", "meerkat_engine", *map(str, own), "--output", b"no-\xff-text"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert r"Error: the argument 'no-\udcff-text' is not utf-8; rename the file" in result.stderr
