"""The step benchmark: it times what it checked, and refuses what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from meerkat_engine import SparseMask, SparseZO, embedded
from meerkat_engine.bench import step

NOISE = pytest.mark.filterwarnings("ignore::UserWarning")  # the profiler's


@NOISE
def test_it_prints_and_records_every_row(tmp_path: Path) -> None:
    result = CliRunner().invoke(step.main, ["--repeats", "2", "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["elements"] == 83776
    assert record["masked"] == 84
    assert list(record["rows"]) == ["meerkat", "sparse-indexing", "mezo"]
    for name, row in record["rows"].items():
        assert row["inside"] > 1
        assert row["median"] > 0
        assert name in result.output
    # MeZO's loop holds a normal tensor and a sum of the largest parameter
    assert record["rows"]["mezo"]["peak_bytes"] >= 2 * 4 * 128 * 64


def test_a_row_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = embedded.load().model
    mask = SparseMask.random(net, 0.01, 1)
    closure = step.closure_of(net, 2, 8)
    step.check_rows(net, mask, SparseZO(net, mask, lr=step.LR), closure)
    step.check_mezo(net, closure)
    right = step.mezo_step
    monkeypatch.setattr(step, "mezo_step", lambda *arguments: 1e6 + right(*arguments))
    with pytest.raises(RuntimeError, match="row 'mezo' does not compute its update; nothing was timed"):
        step.check_mezo(net, closure)
    wrong = SparseZO(net, mask, lr=1.0)
    with pytest.raises(RuntimeError, match="row 'meerkat' does not"):
        step.check_rows(net, mask, wrong, closure)


def test_peak_memory_is_what_is_held_at_a_time() -> None:
    def action() -> None:
        for _ in range(5):
            torch.zeros(1 << 18)

    assert 4 << 18 <= step.peak_bytes(action) < 2 * (4 << 18)
