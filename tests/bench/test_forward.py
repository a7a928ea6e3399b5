"""The forward table of ``meerkat-engine bench``: positions and times of the layouts, checked before they are shown."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from meerkat_engine.bench import forward
from meerkat_engine.cli import main
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.lm import embedded, rows
from meerkat_engine.engine.lm.layout import Layout


def test_the_command_measures_the_tasks_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    sentences = [" ".join(["good"] * (1 + i % 9)) for i in range(60)]
    lines = [json.dumps({"sentence": text, "label": i % 2}) for i, text in enumerate(sentences)]
    (tmp_path / "data" / "sst2" / "train.jsonl").write_text("\n".join(lines))
    arguments = ["bench", "--data-dir", tmp_path / "data", "--repeats", "3", "--no-figures", "--output", tmp_path / "o"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "o" / "result.json").read_text())
    assert (record["kernels"], record["steps"]) == ([], [])
    ((row,),) = [case["rows"] for case in record["forwards"]]
    assert (row["task"], row["reason"]) == ("sst2", "")
    assert row["positions"]["padded"] > row["positions"]["sorted"] > 1
    assert 1 <= row["positions"]["packed"] < 1.1
    assert 0 < row["largest_difference"] < 1e-4
    assert row["ratio"]["padded"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert all(row["ratio"][layout]["median"] > 0 for layout in forward.LAYOUTS)
    table = (tmp_path / "o" / "result.md").read_text()
    assert table.rstrip() in result.output
    assert f"| sst2 | {row['tokens']:.0f} | {row['positions']['padded']:.2f} |" in " ".join(table.split())


def test_wrong_scores_get_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rows.PackedRows.logits
    monkeypatch.setattr(rows.PackedRows, "logits", lambda self, model: right(self, model) * 1.01)
    monkeypatch.setattr("meerkat_engine.engine.lm.layout._difference", lambda *_: "")
    lm = embedded.load()
    (record,) = forward.measure_forwards(lm, forward.task_examples(None)[:1], batch_size=4, repeats=2)
    assert record["failed"].startswith("the layouts' scores differ by ")
    assert "ratio" not in record
    assert "no numbers: the layouts' scores differ" in forward.markdown(
        {"model": "m", "dtype": "float32", "batch_size": 4, "rows": [record]}
    )


def test_a_model_that_cannot_be_packed_has_a_row_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: rows.PackedRows, model: nn.Module) -> torch.Tensor:
        raise ValueError("no such masks")

    monkeypatch.setattr(rows.PackedRows, "logits", fail)
    lm = embedded.load()
    (record,) = forward.measure_forwards(lm, forward.task_examples(None)[:1], batch_size=4, repeats=2)
    assert "no such masks" in record["reason"]
    assert record["positions"].keys() == record["ratio"].keys() == {Layout.PADDED, Layout.SORTED}


def test_a_directory_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has a directory for none of the tasks sst2"):
        forward.task_examples(tmp_path)
