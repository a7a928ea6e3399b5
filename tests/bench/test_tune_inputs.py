"""A search that was stopped goes on only with the examples, the model and the mask's file that it began with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from meerkat_engine.bench.tune import candidate as candidate_module
from meerkat_engine.fed import make_config
from meerkat_engine.fed.setup.mask import file_of_choice

from helpers.command import call
from helpers.free_text import make_chat_tokenizer
from helpers.models import make_model

ROWS = [{"prompt": f"{i}?", "completion": f"{i}, no"} for i in range(20)]
LONG = {"prompt": "why? " * 40, "completion": "so"}


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tune(folder: Path) -> Result:
    return call("tune", "--model", folder / "model", "--data", folder / "rows.jsonl", "--max-length", 64,
                "--calibration", folder / "texts.jsonl", "--density", 0.05, "--lrs", "0.01,0.02,0.04", "--rounds", 2,
                "--tune-rounds", 1, "--local-steps", 1, "--clients", 2, "--batch-size", 4,
                "--output", folder / "search")  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (folder / "search").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a search that was stopped before its third run, and what it printed."""
    folder = tmp_path_factory.mktemp("stopped")
    make_model(vocabulary=272, positions=128).save_pretrained(folder / "model")  # type: ignore[operator]
    make_chat_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", [*ROWS, {"prompt": "none", "completion": ""}, LONG])
    write_rows(folder / "texts.jsonl", [{"text": f"{i} and {i + 1} and so on"} for i in range(8)])
    starts, execute = [], candidate_module.execute

    def stop_at_third(*given: Any, **options: Any) -> Any:
        starts.append(given)
        if len(starts) == 3:
            raise KeyboardInterrupt
        return execute(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidate_module, "execute", stop_at_third)
        printed = tune(folder)
    assert "Aborted!" in printed.output
    assert len(list((folder / "search" / "runs").iterdir())) == 2
    return folder, printed


def other_rows(folder: Path) -> None:
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines).replace("7, no", "7, yes"))


def other_order(folder: Path) -> None:
    """The same rows: another fifth of them is held out."""
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[1:] + lines[:1]))


def other_model(folder: Path) -> None:
    make_model(vocabulary=272, positions=128, seed=1).save_pretrained(folder / "model")  # type: ignore[operator]


def other_texts(folder: Path) -> None:
    write_rows(folder / "texts.jsonl", [{"text": "something else"}] * 8)


def nothing_recorded(folder: Path) -> None:
    (folder / "search" / "inputs.json").unlink()


def damaged_record(folder: Path) -> None:
    (folder / "search" / "inputs.json").write_text('{"base": "1"}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_rows, "began with other examples, and its runs cannot be compared with new ones; put back"),
        (other_order, "began with other examples, and"),
        (other_model, "began with another base model or dtype, and"),
        (other_texts, "began with another mask file or calibration text, and"),
        (nothing_recorded, "inputs.json is missing: without it nothing tells"),
        (damaged_record, "inputs.json is damaged"),
    ],
)
def test_other_inputs_are_refused_before_the_next_run(
    stopped: tuple[Path, Result], change: Callable[[Path], None], message: str
) -> None:
    folder, _ = stopped
    saved = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    change(folder)
    before = files(folder)
    try:
        result = tune(folder)
        assert result.exit_code == 1, result.output
        assert message in result.output
        assert result.output.count("Error:") == 1
        assert "(nothing was changed)" in result.output
        assert files(folder) == before
    finally:
        for path, content in saved.items():
            path.write_bytes(content)


def test_what_was_left_out_or_cut_is_said_once(stopped: tuple[Path, Result]) -> None:
    _, printed = stopped
    notes = [line for line in printed.output.splitlines() if line.startswith("training data: ")]
    assert len(notes) == 2
    assert "no answer" in notes[0]
    assert "cut" in notes[1]
    assert printed.output.count("the first example, what is learned") == 1


def test_with_the_same_inputs_it_goes_on(stopped: tuple[Path, Result]) -> None:
    """Last in this file: it finishes the search."""
    folder, _ = stopped
    record = (folder / "search" / "inputs.json").read_bytes()
    result = tune(folder)
    assert result.output.count("rounds 1 to 1") == 1, result.output
    assert len(list((folder / "search" / "runs").iterdir())) == 3
    assert (folder / "search" / "inputs.json").read_bytes() == record


def test_masks_depend_on_their_file_or_on_the_calibration_text(tmp_path: Path) -> None:
    sample = tmp_path / "c4_sample" / "train.jsonl"
    sample.parent.mkdir()
    sample.write_text("")
    model = {"model": "m", "task": "sst2", "data_dir": tmp_path}
    assert file_of_choice(make_config({**model, "mask": "mask"})) == Path("mask")
    assert file_of_choice(make_config({**model, "calibration": "texts"})) == Path("texts")
    assert file_of_choice(make_config(model)) == sample
    assert file_of_choice(make_config({**model, "method": "random-mask"})) is None
    assert file_of_choice(make_config({"model": "embedded"})) is None
