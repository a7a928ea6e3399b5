"""What can be tried: both versions of a run have exactly their bits; what cannot be tried is named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meerkat_engine.engine.errors import ConfigError, RunError
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.fed.inference.target import open_target
from meerkat_engine.fed.ledger.file import read_ledger

from helpers.command import call, summary_of


@pytest.mark.parametrize("method", ["random-mask", "full-fedzo", "fedavg", "lora-fedzo"])
def test_both_versions_have_the_bits_of_the_run(method: str, tmp_path: Path) -> None:
    made = call("run", "--method", method, "--rounds", 1, "--local-steps", 1, "--clients", 2, "--batch-size", 4,
                "--calibration-texts", 8, "--eval-examples", 8, "--output", tmp_path / "r")  # fmt: skip
    assert made.exit_code == 0, made.output
    target = open_target(str(tmp_path / "r"), {})
    base, tuned = read_ledger(tmp_path / "r" / "ledger.jsonl").header.base, summary_of(tmp_path / "r")["weights"]
    assert base != tuned
    for _ in range(2):
        with target.base() as lm:
            assert fingerprint(lm.model) == base
        with target.tuned() as lm:
            assert fingerprint(lm.model) == tuned
    with pytest.raises(KeyboardInterrupt), target.base():
        raise KeyboardInterrupt
    assert fingerprint(target.lm.model) == tuned


def test_an_earlier_round_of_a_run(classified: Path) -> None:
    weights = {number: fingerprint(open_target(str(classified), {}, round=number).lm.model) for number in range(3)}
    assert len(set(weights.values())) == 3
    assert weights[0] == read_ledger(classified / "ledger.jsonl").header.base


def test_a_checkpoint_has_one_version(classified: Path, tmp_path: Path) -> None:
    assert call("replay", classified, "--output", tmp_path / "critic").exit_code == 0
    target = open_target(str(tmp_path / "critic"), {"task": "embedded"})
    assert list(target.versions) == ["model"]
    with target.base() as lm:
        assert fingerprint(lm.model) == summary_of(classified)["weights"]
    with pytest.raises(ConfigError, match="one version"), target.tuned():
        pass


def test_weights_that_are_not_the_runs_are_an_error(classified: Path, tmp_path: Path) -> None:
    shutil.copytree(classified, tmp_path / "r")
    metrics = tmp_path / "r" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace(summary_of(classified)["weights"], "0" * 64))
    with pytest.raises(RunError, match="ended with other weights"):
        open_target(str(tmp_path / "r"), {})


@pytest.mark.parametrize("keep", [["config.toml"], ["config.toml", "mask.safetensors", "origin.json", "ledger.jsonl"]])
def test_a_run_that_has_trained_nothing(keep: list[str], classified: Path, tmp_path: Path) -> None:
    for name in keep:
        shutil.copy(classified / name, tmp_path / name)
    if "ledger.jsonl" in keep:
        ledger = tmp_path / "ledger.jsonl"
        ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(RunError, match="has trained nothing yet: no round is complete; continue it with"):
        open_target(str(tmp_path), {})


def test_a_run_whose_model_has_moved_is_found_again(
    talked: Path, chat_model: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    shutil.copytree(talked, tmp_path / "r")
    config = tmp_path / "r" / "config.toml"
    config.write_text(config.read_text().replace(str(chat_model), str(tmp_path / "gone")))
    message = fails("predict", tmp_path / "r", "--field", "prompt=a")
    assert "if it was moved, give --model" in message
    target = open_target(str(tmp_path / "r"), {}, base_model=str(chat_model))
    assert fingerprint(target.lm.model) == summary_of(talked)["weights"]


def test_a_directory_without_weights(chat_model: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    for file in chat_model.glob("*.json"):
        shutil.copy(file, tmp_path / file.name)
    assert "no file named model.safetensors" in fails("predict", tmp_path, "--text", "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": {"labels": "a,b"}}, "is a run, which has its own labels; leave --labels out"),
        ({"given": {"device": "cpu"}}, "is a run, which has its own device; leave --device out"),
    ],
)
def test_a_run_has_its_own_task_and_model(options: dict[str, Any], message: str, classified: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_target(str(classified), **options)


@pytest.mark.parametrize("option", [{"round": 1}, {"base_model": "embedded"}])
def test_options_of_runs_are_refused_for_models(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is for runs, and embedded is no run directory"):
        open_target("embedded", {}, **option)
