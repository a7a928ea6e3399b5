"""``evaluate`` of a run takes the run's own held-out examples, or says that it does not know them."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from meerkat_engine.fed import Client, ClientData, RemotePool, Replica, execute, make_config
from meerkat_engine.fed.setup.data import encode
from meerkat_engine.fed.setup.mask import make_mask
from meerkat_engine.fed.setup.model import load_language_model
from meerkat_engine.fed.setup.server_and_clients import make_terms

from helpers.command import call, summary_of

CHANGED = "the examples have changed since the run in"


@pytest.fixture(scope="module")
def own(folder: Path, faq: Path) -> tuple[Path, Path]:
    """A run, and its file of examples."""
    data = folder / "own.jsonl"
    shutil.copy(faq, data)
    result = call("run", "--model", "embedded", "--data", data, "--method", "random-mask", "--rounds", 1,
                  "--clients", 2, "--local-steps", 1, "--batch-size", 8, "--output", folder / "own")  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder / "own", data


def first_row_moved(rows: list[str]) -> list[str]:
    return rows[1:] + rows[:1]


def row_at_the_top(rows: list[str]) -> list[str]:
    return [json.dumps({"prompt": "the tea was cold . my answer is", "completion": " no"}), *rows]


def rows_at_the_end(rows: list[str]) -> list[str]:
    return [*rows, *row_at_the_top(rows)[:1] * 5]


def few_rows(rows: list[str]) -> list[str]:
    """Too few for the clients to have a batch each."""
    return rows[:8]


def other_answer(rows: list[str]) -> list[str]:
    return [rows[0].replace(" no", " yes"), *rows[1:]]


@pytest.mark.parametrize("change", [first_row_moved, row_at_the_top, rows_at_the_end, few_rows, other_answer])
@pytest.mark.parametrize("options", [[], ["--max-length", 8], ["--eval-examples", 2]])
def test_other_examples_are_not_called_held_out(
    own: tuple[Path, Path], change: Callable[[list[str]], list[str]], options: list[object], fails: Callable[..., str]
) -> None:
    run, data = own
    before = data.read_text()
    data.write_text("".join(line + "\n" for line in change(before.splitlines())))
    try:
        assert CHANGED in fails("evaluate", run, *options)
    finally:
        data.write_text(before)


def test_settings_of_the_user_change_no_more_than_tokens_and_number(own: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = own
    assert "own, held-out examples: 4 examples" in call("evaluate", run).output
    assert "own, held-out examples: 2 examples" in call("evaluate", run, "--eval-examples", 2).output
    short = call("evaluate", run, "--max-length", 8, "--output", tmp_path / "s.json")
    assert short.exit_code == 0, short.output
    assert (
        json.loads((tmp_path / "s.json").read_text())["scores"]["before"]["validation_loss"]
        != (summary_of(run)["validation_loss_before"])
    )


def test_without_origin_the_held_out_examples_are_not_known(
    own: tuple[Path, Path], faq: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(own[0], run)
    (run / "origin.json").write_text("{}")
    assert "origin.json is damaged" in fails("evaluate", run)
    (run / "origin.json").unlink()
    assert f"{run / 'origin.json'} is missing: without it nothing tells whether the held-out" in fails("evaluate", run)
    assert f"{faq}: 20 examples" in call("evaluate", run, "--data", faq).output


def test_a_run_whose_clients_had_their_own_examples(faq: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    """Its examples were not dealt, so its ``origin.json`` has no partition. These could not be: batches are large."""
    data = tmp_path / "server.jsonl"
    shutil.copy(faq, data)
    config = make_config({"model": "embedded", "data": data, "clients": 1, "rounds": 1, "local_steps": 1,
                          "batch_size": 17, "method": "random-mask"})  # fmt: skip
    lm = load_language_model(config)
    replica = Replica(lm.model, mask := make_mask(config, lm), make_terms(config, mask))
    client = Client(0, ClientData(encode(config, lm).train, torch.arange(16), 8, 0), replica, config.objective)

    def exchange(requests: Iterable[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        return [(i, client.handle(request)) for i, request in requests]

    execute(config, tmp_path / "run", lambda _: None, lambda _: None, pool=RemotePool(exchange))
    assert "server, held-out examples: 4 examples" in call("evaluate", tmp_path / "run").output
    data.write_text("".join(line + "\n" for line in row_at_the_top(data.read_text().splitlines())))
    assert CHANGED in fails("evaluate", tmp_path / "run")
