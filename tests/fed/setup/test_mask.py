"""Masks from the settings of a run."""

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from meerkat_engine.engine import ranking
from meerkat_engine.engine.lm.examples import EncodedTask

from helpers.command import call, summary_of

ELEMENTS = ("--calibration-elements", "20000")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of parameters whose gradients are accumulated, one for each pass over the texts."""
    accumulate, counts = ranking.accumulate_gradients, []

    def counted(model: Any, batches: Any, loss: Any, names: Any, **options: Any) -> Any:
        counts.append(len(names))
        return accumulate(model, batches, loss, names, **options)

    monkeypatch.setattr(ranking, "accumulate_gradients", counted)
    return counts


def contents(file: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata, in which there is a checksum, and bytes of the tensors."""
    with safe_open(file, framework="np") as tensors:
        return tensors.metadata(), {name: tensors.get_tensor(name).tobytes() for name in sorted(tensors.keys())}


@pytest.mark.parametrize("method", ["meerkat", "task-mask"])
@pytest.mark.parametrize("quantize", ["none", "as-stored"])
def test_a_mask_chosen_a_part_at_a_time_is_the_same_file(
    method: str, quantize: str, passes: list[int], tmp_path: Path
) -> None:
    settings = ("mask", "--task", "embedded", "--method", method, "--calibration-texts", 8, "--quantize", quantize)
    assert call(*settings, "--output", tmp_path / "whole").exit_code == 0
    assert len(passes) == 1
    result = call(*settings, *ELEMENTS, "--output", tmp_path / "parts")
    assert result.exit_code == 0, result.output
    assert len(passes) > 4
    assert sum(passes[1:]) == passes[0]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_run_may_change_how_much_of_its_mask_is_chosen_at_a_time(passes: list[int], tmp_path: Path) -> None:
    short = ("--rounds", "1", "--local-steps", "1", "--calibration-texts", "8", "--eval-examples", "20")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call("run", *short, "--output", whole).exit_code == 0
    assert call("run", *short, *ELEMENTS, "--output", parts).exit_code == 0
    assert len(passes) > 5
    assert contents(parts / "mask.safetensors") == contents(whole / "mask.safetensors")
    assert summary_of(parts)["weights"] == summary_of(whole)["weights"]
    passes.clear()
    for name in ("mask.safetensors", "ledger.jsonl", "metrics.jsonl", "gradip.jsonl"):
        (whole / name).unlink()
    result = call("run", "--resume", whole, *ELEMENTS)
    assert result.exit_code == 0, result.output
    assert len(passes) > 4
    assert summary_of(whole)["weights"] == summary_of(parts)["weights"]
    assert "the same bits" in call("replay", whole).output


def test_a_negative_number_is_an_error(tmp_path: Path) -> None:
    result = call("mask", "--calibration-elements", "-1", "--output", tmp_path / "m")
    assert result.exit_code == 1
    assert "calibration_elements must be 0 or more, got -1" in result.output


def test_the_mask_of_a_client_is_chosen_on_its_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients of a single-label partition: their batches have one label, and together they are all examples."""
    taken: list[list[int]] = []
    batch = EncodedTask.batch

    def noted(self: EncodedTask, indices: list[int], **options: Any) -> Any:
        taken[-1] += [int(self.labels[i]) for i in indices]
        return batch(self, indices, **options)

    monkeypatch.setattr(EncodedTask, "batch", noted)
    settings = ("mask", "--task", "embedded", "--method", "task-mask", "--calibration-texts", 16, "--clients", 2,
                "--partition", "single-label")  # fmt: skip
    for client in (0, 1):
        taken.append([])
        result = call(*settings, "--client", client, "--output", tmp_path / f"{client}")
        assert result.exit_code == 0, result.output
    assert taken == [[0] * 16, [1] * 16]
    assert contents(tmp_path / "0")[1]["ids"] != contents(tmp_path / "1")[1]["ids"]
    absent = call(*settings, "--client", 2, "--output", tmp_path / "2")
    assert "there is no client 2: the 2 clients have numbers from 0 on" in absent.output
    assert "give --method task-mask" in call("mask", "--client", 0, "--output", tmp_path / "2").output
