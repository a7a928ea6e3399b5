"""Tests of the recipes: each can be read, planned, and, where it needs nothing, run; and of the commands about them."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from meerkat_engine.cli import main
from meerkat_engine.fed import make_config
from meerkat_engine.fed.config.toml import read_toml
from meerkat_engine.fed.recipe import recipes
from meerkat_engine.fed.run.plan import make_plan

from helpers.imports import ROOT

NAMES = list(recipes())
SMALL: dict[str, Any] = {
    "rounds": 1, "local_steps": 1, "batch_size": 4, "eval_examples": 20, "calibration_texts": 16, "vp_steps": 8,
    "vp_initial": 3, "vp_later": 4, "vp_null_paths": 3,
}  # fmt: skip


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["recipe", *map(str, arguments)])


def settings_of(name: str) -> dict[str, Any]:
    """The flat settings of a recipe."""
    path = recipes()[name]
    if name == "flower":
        settings = {key.replace("-", "_"): value for key, value in tomllib.loads(path.read_text()).items()}
        settings.pop("output")
        return settings
    return read_toml(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is(name: str) -> None:
    lines = recipes()[name].read_text().split("\n\n")[0].splitlines()
    assert len(lines[0]) > 20
    words = [line.split()[1] for line in lines if re.match(r"#  ?\w", line)]
    assert words[1:] == ["command", "needs", "takes", "result"]
    assert name + ".toml" in next(line for line in lines if "# command" in line)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_planned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded model and task in place of those of the hub, and little of everything."""
    monkeypatch.chdir(tmp_path)
    given = settings_of(name)
    make_config(given)  # as it stands
    (tmp_path / "reviews.csv").write_text("text,label\n" + "the film was good,1\nthe film was bad,0\n" * 20)
    rows = [json.dumps({"prompt": "the film was", "completion": " good"})] * 40
    (tmp_path / "answers.jsonl").write_text("\n".join(rows))
    if "model" in given:
        given |= {"model": "embedded", "device": "cpu"} | ({"task": "embedded"} if "task" in given else {})
    plan = make_plan(make_config(given, SMALL), lambda _: None)
    assert plan.masked_elements > 0


def test_flowers_recipe_sets_what_the_app_takes() -> None:
    app = tomllib.loads((ROOT / "examples" / "flower" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert tomllib.loads(recipes()["flower"].read_text()).keys() <= app.keys()


@pytest.mark.parametrize("name", ["early-stopping", "private", "robust", "torchrun"])
def test_a_recipe_that_needs_nothing_does_what_it_says(name: str, tmp_path: Path) -> None:
    path = recipes()[name]
    result = CliRunner().invoke(main, ["run", "--config", str(path), "--output", str(tmp_path / "r")])
    assert result.exit_code == 0, result.output
    measured = re.search(r"accuracy (\S+) before, (\d\.\d+) after", path.read_text())
    assert measured is not None
    assert f"accuracy        {measured[1]} before, {measured[2]} after" in result.output
    if name == "early-stopping":
        assert "stopped early   4, 5, 6, 7 (single-label clients: 4, 5, 6, 7" in result.output


def test_list_names_all_and_copy_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [line.split()[0] for line in call("list").output.splitlines()] == NAMES
    result = call("copy", "robust")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Hostile clients: two of ten flip the sign")
    assert result.output.endswith("copied to robust.toml\n")
    assert (tmp_path / "robust.toml").read_bytes() == recipes()["robust"].read_bytes()
    (tmp_path / "robust.toml").write_text("mine")
    again = call("copy", "robust")
    assert again.exit_code == 1
    assert "robust.toml exists already; choose another --output, nothing was changed" in again.output
    assert (tmp_path / "robust.toml").read_text() == "mine"
    assert "there is no directory nowhere" in call("copy", "robust", "--output", "nowhere/x.toml").output
    assert call("copy", "rich").exit_code == 2
