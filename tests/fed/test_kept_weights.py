"""Settings of read-only base weights: combinations, how masked weights are added, and what a delta is applied to."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meerkat_engine.engine.delta import Delta
from meerkat_engine.fed.config.run_config import make_config

from helpers.command import call

SHORT = ("--rounds", "2", "--local-steps", "2", "--calibration-texts", "8", "--eval-examples", "40")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--offload", "cpu"), "offload cpu is for read-only weights; give --quantize too"),
        (("--masked-weights", "add"), "masked_weights add is for read-only weights; give --quantize too"),
        (("--points", "together"), "points together need read-only weights; give --quantize"),
        (("--quantize", "nf4", "--points", "together", "--method", "decomfl"), "decomfl has no two points"),
        (("--quantize", "nf4", "--points", "together", "--method", "fedavg"), "fedavg has no two points"),
        (("--quantize", "int8", "--offload", "cpu"), "on a CPU, leave --offload out"),
        (("--quantize", "int8", "--points", "together", "--method", "lora-fedzo"), "is plain; load the model with"),
        (("--quantize", "int4"), "'int4'"),
        (("--quantize", "nf4", "--masked-weights", "add", "--method", "fedavg"), "trains by backpropagation"),
        (("--quantize", "nf4", "--masked-weights", "round"), "rounded to int8 only"),
        (("--calibration-elements", "9", "--method", "weight-magnitude"), "leave it out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_settings_that_do_not_fit_are_refused(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = call("run", *SHORT, *options, "--output", tmp_path / "run")
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())


def test_what_a_delta_says_of_its_base() -> None:
    given = {"model": "m", "task": "sst2"}
    assert make_config(given).model.kept == "none"
    assert make_config(given | {"quantize": "nf4"}).model.kept == "nf4"
    assert make_config(given | {"quantize": "nf4", "masked_weights": "add"}).model.kept == "nf4+add"


@pytest.mark.parametrize("added", [False, True], ids=["written", "added"])
def test_a_quantized_run_is_replayed_and_its_delta_applied(added: bool, tmp_path: Path) -> None:
    options = ("--masked-weights", "add", "--dtype", "bfloat16") if added else ("--points", "together")
    run, delta = tmp_path / "run", tmp_path / "d"
    assert call("run", *SHORT, "--quantize", "nf4", *options, "--output", run).exit_code == 0
    replayed = call("replay", run, "--delta", delta, "--output", tmp_path / "replayed")
    assert "the same bits as at the end of the run" in replayed.output, replayed.output
    assert Delta.load(delta).kept == ("nf4+add" if added else "nf4")
    applied = call("apply", delta, "--model", "embedded", "--output", tmp_path / "applied")
    assert applied.exit_code == 0, applied.output
    other = call("apply", delta, "--model", "embedded", "--onto-plain", "--output", tmp_path / "other")
    assert "another model than the run's" in other.output
    mine, again, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("replayed", "applied", "other"))
    assert all(torch.equal(mine[name], again[name]) for name in mine)
    layer = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(mine[layer], plain[layer])
    assert "dequantized, kept as nf4" in (tmp_path / "applied" / "README.md").read_text()
    assert "another model than that of the run" in (tmp_path / "other" / "README.md").read_text()
    # The masked weights are those of the run in both.
    masked = Delta.load(delta)
    for name, base, start, stop in masked.mask.ranges():
        at = masked.mask.ids[start:stop] - base
        assert torch.equal(mine[name].view(-1)[at], plain[name].view(-1)[at])
        assert torch.equal(mine[name].view(-1)[at], masked.masters[start:stop].to(mine[name].dtype))


def test_a_plain_delta_is_only_applied_to_its_base(tmp_path: Path) -> None:
    run, delta = tmp_path / "run", tmp_path / "d"
    assert call("run", *SHORT, "--output", run).exit_code == 0
    assert call("replay", run, "--delta", delta).exit_code == 0
    result = call("apply", delta, "--model", "embedded", "--onto-plain", "--output", tmp_path / "out")
    assert "is of a run on plain weights; leave --onto-plain out" in result.output
    assert not (tmp_path / "out").exists()


def test_masked_weights_rounded_to_int8_replay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--quantize", "int8", "--masked-weights", "round")
    assert call("run", *SHORT, *options, "--output", run).exit_code == 0
    assert "the same bits as at the end of the run" in call("replay", run, "--delta", tmp_path / "d").output
    assert Delta.load(tmp_path / "d").kept == "int8+round"
    applied = call("apply", tmp_path / "d", "--model", "embedded", "--output", tmp_path / "applied")
    assert applied.exit_code == 0, applied.output


def test_a_delta_of_quantized_weights_fits_no_other_base(tmp_path: Path) -> None:
    run, delta = tmp_path / "run", tmp_path / "d"
    assert call("run", *SHORT, "--quantize", "int8", "--output", run).exit_code == 0
    assert call("replay", run, "--delta", delta).exit_code == 0
    text = Delta.load(delta)
    object.__setattr__(text, "kept", "none")
    text.save(tmp_path / "plain")
    result = call("apply", tmp_path / "plain", "--model", "embedded", "--output", tmp_path / "out")
    assert "this model has fingerprint" in result.output
    object.__setattr__(text, "kept", "q3")
    text.save(tmp_path / "unknown")
    result = call("apply", tmp_path / "unknown", "--model", "embedded", "--output", tmp_path / "out")
    assert "kept as 'q3'; known: none, as-stored, nf4, int8, torchao-int8" in result.output
    assert not (tmp_path / "out").exists()
