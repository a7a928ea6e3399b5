"""Tests of ``meerkat-engine bench-server``: rounds are checked before they are timed, and bytes are those sent."""

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


def test_the_command_prints_and_writes_tables_and_json(tmp_path: Path) -> None:
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
        assert all(case[kind][part]["median"] > 0 for part in scale.EXTRA_PARTS)
    assert case["ledger_bytes"] > 300 * 3 * 8
    # Three fp32 scalars per client, and the objects around them.
    assert case["memory"]["all have answered"] - case["memory"]["at the beginning"] > 12
    assert (output / "result.md").read_text() in result.output
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code != 0
    assert "choose a new directory for --output" in again.output


def test_a_wrong_aggregate_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = server.aggregate

    def wrong(*arguments: Any) -> list[float]:
        return [float(np.nextafter(np.float32(g), np.float32(9))) for g in correct(*arguments)]

    monkeypatch.setattr(server, "aggregate", wrong)
    with pytest.raises(CheckError, match=r"200 clients: aggregated scalar 0 is .*, expected"):
        scale.measure_round(200, 2, 2)


def test_a_ledger_that_reads_back_another_round_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse_without_client_0(*arguments: Any) -> RoundRecord:
        record = parse_round(*arguments)
        return replace(record, clients={i: scalars for i, scalars in record.clients.items() if i})

    monkeypatch.setattr("meerkat_engine.fed.ledger.file.parse_round", parse_without_client_0)
    with pytest.raises(CheckError, match="the round read back from the ledger differs from the one written"):
        scale.measure_round(200, 2, 2)


def test_element_counts_of_a_published_model() -> None:
    assert traffic.elements() == 1_235_814_400
    # 16 layers, rank 8: q 2048 -> 2048, v 2048 -> 512
    assert traffic.lora_elements() == 16 * 8 * ((2048 + 2048) + (2048 + 512))


def test_bytes_are_those_of_encoded_messages() -> None:
    assert traffic.message_bytes(1) == (44, 44)
    assert traffic.per_day(60)["bytes"]["scalars, T = 10"] == 1440 * (80 + 80)
    # The scalars of two hours.
    missed_update = np.ones(120, dtype=np.float32)
    request = TrainRequest(client=1, round=121, local_steps=1, first_round=1, scalars=missed_update).encode()
    assert traffic.catching_up(1, 60)["day"] == len(request) + 4 * (1440 - 120)


def test_masters_are_smaller_from_the_day_that_the_server_sends_them() -> None:
    sizes = traffic.catching_up(10, 1.0)
    rounds = sizes["days_until_masters"] * 86_400
    assert 40 + 4 * 10 * rounds == pytest.approx(sizes["masters"])
