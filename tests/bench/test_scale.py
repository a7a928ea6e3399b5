"""``meerkat-engine bench-server``: it times a server whose round it checked, and counts bytes as they are sent."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from meerkat_engine.bench import scale, traffic
from meerkat_engine.bench.kernels import CheckError
from meerkat_engine.cli import main
from meerkat_engine.fed import server
from meerkat_engine.fed.ledger.file import RoundRecord, parse_round
from meerkat_engine.fed.messages import TrainRequest


def test_one_command_prints_and_writes_everything(tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["bench-server", "--clients", "300", "--local-steps", "3", "--repeats", "3", "--output", str(output)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((output / "result.json").read_text())
    assert record["command"] == "meerkat-engine " + " ".join(arguments)
    (case,) = record["cases"]
    for kind in ("seconds", "cpu"):
        parts = sum(case[kind][part]["median"] for part in scale.PARTS)
        assert parts == pytest.approx(case[kind]["round"]["median"], rel=0.5)
        assert all(case[kind][part]["median"] > 0 for part in scale.BESIDE)
    assert case["ledger_bytes"] > 300 * 3 * 8
    # what all answered with, 3 fp32 of each, and the objects around it
    assert case["memory"]["all have answered"] - case["memory"]["at the beginning"] > 12
    assert (output / "result.md").read_text() in result.output
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code != 0
    assert "give --output a new directory" in again.output


def test_a_broken_aggregate_gets_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = server.aggregate

    def broken(*arguments: Any) -> list[float]:
        return [float(np.nextafter(np.float32(g), np.float32(9))) for g in sound(*arguments)]

    monkeypatch.setattr(server, "aggregate", broken)
    with pytest.raises(CheckError, match=r"200 clients: scalar 0 is .* and should be"):
        scale.of_clients(200, 2, 2)


def test_a_ledger_that_keeps_something_else_gets_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*arguments: Any) -> RoundRecord:
        found = parse_round(*arguments)
        return replace(found, clients={i: own for i, own in found.clients.items() if i})

    monkeypatch.setattr("meerkat_engine.fed.ledger.file.parse_round", forgetful)
    with pytest.raises(CheckError, match="the ledger reads back another round than was written"):
        scale.of_clients(200, 2, 2)


def test_sizes_of_a_published_model() -> None:
    assert traffic.elements() == 1_235_814_400
    # 16 layers, rank 8: q 2048 -> 2048, v 2048 -> 512
    assert traffic.lora_elements() == 16 * 8 * ((2048 + 2048) + (2048 + 512))


def test_bytes_are_those_of_messages() -> None:
    assert traffic.message_bytes(1) == (44, 44)
    assert traffic.per_day(60)["bytes"]["scalars, T = 10"] == 1440 * (80 + 80)
    # two hours' scalars
    missed = np.ones(120, dtype=np.float32)
    request = TrainRequest(client=1, round=121, local_steps=1, first_round=1, scalars=missed).encode()
    assert traffic.catching_up(1, 60)["day"] == len(request) + 4 * (1440 - 120)


def test_masters_are_smaller_from_where_the_server_sends_them() -> None:
    found = traffic.catching_up(10, 1.0)
    rounds = found["days_until_masters"] * 86_400
    assert 40 + 4 * 10 * rounds == pytest.approx(found["masters"])
