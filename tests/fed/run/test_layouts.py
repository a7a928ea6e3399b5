"""A run chooses the layout of its batches, says so where that matters, and learns the same in each."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from meerkat_engine.engine.errors import RunError
from meerkat_engine.engine.lm.rows import PackedRows
from meerkat_engine.fed.torchrun import rank_pool
from meerkat_engine.fed.torchrun.rank_pool import RankPool
from meerkat_engine.fed.torchrun.ranks import software

from helpers.command import call, metrics_of, summary_of

SMALL = ("--rounds", "4", "--local-steps", "5", "--calibration-texts", "32", "--eval-examples", "100")


def losses_of(directory: Path) -> list[Any]:
    return [line["loss"] for line in metrics_of(directory)[:-1]]


def no_such_masks(self: PackedRows, model: nn.Module) -> Tensor:
    raise TypeError("no such masks")


def test_layouts_give_the_same_losses_up_to_rounding(tmp_path: Path) -> None:
    losses = {}
    for layout in ("auto", "packed", "sorted", "padded"):
        result = call("run", *SMALL, "--layout", layout, "--output", tmp_path / layout)
        assert result.exit_code == 0, result.output
        assert "batches are" not in result.output
        losses[layout] = losses_of(tmp_path / layout)
    assert losses["auto"] == losses["packed"]
    assert losses["packed"] != losses["sorted"] != losses["padded"] != losses["packed"]  # other bits
    for layout in ("sorted", "padded"):
        assert losses[layout] == pytest.approx(losses["packed"], rel=1e-3)


def test_a_model_that_cannot_be_packed_is_said_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("run", *SMALL, "--layout", "sorted", "--output", tmp_path / "sorted")
    monkeypatch.setattr(PackedRows, "logits", no_such_masks)
    result = call("run", *SMALL, "--output", tmp_path / "auto")
    assert result.exit_code == 0, result.output
    assert (
        "batches are sorted, not packed: LlamaForCausalLM takes no rows of several examples (TypeError: no such masks)"
        in result.output
    )
    assert summary_of(tmp_path / "auto")["weights"] == summary_of(tmp_path / "sorted")["weights"]


def test_packed_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedRows, "logits", no_such_masks)
    result = call("run", *SMALL, "--layout", "packed", "--output", tmp_path / "r")
    assert result.exit_code == 1
    assert "Error: layout packed does not fit this model: LlamaForCausalLM takes no rows" in result.output
    assert result.output.rstrip().endswith("use layout auto or sorted")
    assert not (tmp_path / "r").exists()


def test_ranks_with_another_layout_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [text.encode() for text in ("base", "examples", "sorted", software())]
    monkeypatch.setattr(rank_pool, "_answer_of", lambda *_: answer)
    pool = RankPool(SimpleNamespace(world=2, micro_batch_map=None, others=[1]))  # type: ignore[arg-type]
    pool.check("base", "examples", "sorted")
    with pytest.raises(RunError, match="rank 1 found that its batches can be sorted, and rank 0 packed; give --layout"):
        pool.check("base", "examples", "packed")
