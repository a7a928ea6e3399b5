"""Tests of ``meerkat-engine bench-memory``: each case's memory in a process of its own, within its bound."""

import json
from pathlib import Path

import pytest

from meerkat_engine.bench import memory
from meerkat_engine.bench.memory import Case, in_own_process, measure_times
from meerkat_engine.bench.memory_command import markdown

from helpers.command import call

SMALL = {"model": "pythia-14m", "rows": 2, "length": 6}


def test_a_case_takes_its_weights_its_masked_elements_and_one_layer() -> None:
    plain = in_own_process(Case(**SMALL))
    found = in_own_process(Case(**SMALL, quantize="nf4"))
    assert plain["base"] == 4 * plain["elements"]
    # Half a byte and a scale for the linear layers, two bytes for the rest, in bfloat16 (embeddings and head).
    assert found["elements"] == plain["elements"]
    assert 2 * 2 * 50304 * 128 < found["base"] < 2 * found["elements"]
    assert found["masked"] <= 24 * found["masked_elements"]
    assert found["masked_elements"] == round(1e-3 * found["elements"])
    assert found["layer"] == 4 * 50304 * 128
    assert found["layer"] < found["step"] < 1.02 * (found["layer"] + plain["step"])
    assert found["mapped"] == 0


def test_a_case_that_fails_says_why() -> None:
    assert "offload is for weights that a GPU computes with" in in_own_process(
        Case(**SMALL, quantize="nf4", offload="cpu")
    )["failed"]  # fmt: skip


def test_times_are_of_steps_and_forwards() -> None:
    case = Case(**SMALL, quantize="as-stored")
    times = measure_times(case, Case(**SMALL), 2)
    assert 0.5 < times["over_forwards"] < 3
    assert times["over_plain"] > 0.3


def test_the_command_prints_and_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [Case(model="embedded"), Case(model="embedded", quantize="int8", points="together")]
    monkeypatch.setattr("meerkat_engine.bench.memory_command.cases", lambda *_: iter(chosen))
    result = {"base": 4000, "mapped": 0, "masked": 16, "step": 900, "layer": 800, "process": 9, "masked_elements": 1}
    monkeypatch.setattr("meerkat_engine.bench.memory_command.in_own_process", lambda _: result)
    output = tmp_path / "out"
    shown = call("bench-memory", "--model", "embedded", "--repeats", "0", "--output", output)
    assert shown.exit_code == 0, shown.output
    record = json.loads((output / "result.json").read_text())
    assert [case["name"] for case in record["cases"]] == ["in place, float32", "int8, float32, both points in one pass"]
    assert (output / "result.md").read_text() == markdown(record)
    assert "| int8, float32, both points in one pass | 4 kB" in shown.output
    assert f"{(4000 + 16 + 900) / (4000 + 24 + 900 + 800):.3f}" in shown.output
    assert "choose a new directory" in call("bench-memory", "--output", output).output


def test_mapped_files_are_told_from_memory(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "f"
    path.write_bytes(bytes(4096))
    assert memory._is_mapped(torch.from_file(str(path), shared=False, size=1024, dtype=torch.float32))
    assert not memory._is_mapped(torch.zeros(1024))
