"""The device and dtype that a run has if nobody sets them."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meerkat_engine.engine.errors import ConfigError, ModelError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.own_dtype import own_dtype
from meerkat_engine.fed import make_config, resume
from meerkat_engine.fed.setup.model import load_language_model, resolved, slow_dtype

from helpers.command import call, summary_of


def checkpoint(path: Path, dtype: torch.dtype, *, shards: bool = False) -> Path:
    """The embedded model with weights of a dtype; one norm stays float32, as in some checkpoints."""
    path.mkdir()
    for file in embedded.DIRECTORY.iterdir():
        if file.suffix == ".json":
            (path / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(embedded.DIRECTORY / "model.safetensors").items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    if not shards:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    names = sorted(tensors)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file_name in set(places.values()):
        part = {name: tensors[name] for name in names if places[name] == file_name}
        save_file(part, path / file_name, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_checkpoint_has_the_dtype_of_most_of_its_elements(tmp_path: Path, dtype: torch.dtype, shards: bool) -> None:
    wanted = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(dtype, "float32")
    assert own_dtype(str(checkpoint(tmp_path / "m", dtype, shards=shards))) == wanted


def test_a_checkpoint_that_cannot_be_read_is_left_to_the_loading(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m", torch.bfloat16)
    (path / "model.safetensors").write_bytes(b"damaged")
    assert own_dtype(str(path)) == own_dtype(str(tmp_path / "nothing")) == own_dtype("none.gguf") == "float32"
    with pytest.raises(ModelError):
        load_language_model(make_config({"model": str(path), "task": "sst2", "dtype": own_dtype(str(path))}))


def test_auto_is_a_gpu_with_the_dtype_of_the_checkpoint_or_a_cpu_with_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"model": str(checkpoint(tmp_path / "m", torch.bfloat16)), "task": "sst2"}

    def found(**given: str) -> tuple[str, str]:
        config = resolved(make_config(model, given))
        assert resolved(config) == config
        return config.model.device, config.model.dtype

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found() == ("cpu", "float32")
    assert found(dtype="float16") == ("cpu", "float16")
    with pytest.raises(ModelError, match="torch sees no CUDA or ROCm device; use --device cpu"):
        found(device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert found() == ("cuda", "bfloat16")
    assert found(device="cpu") == ("cpu", "float32")
    assert found(dtype="float32") == ("cuda", "float32")
    assert resolved(make_config({})).model.dtype == "float32"  # the embedded model's own
    with pytest.raises(ConfigError, match="dtype must be one of auto, float32, bfloat16, float16, got int8"):
        make_config({"dtype": "int8"})


def test_float32_on_a_gpu_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"device": "cuda"}
    line = slow_dtype(make_config(gpu, {"dtype": "float32"}))
    assert line is not None
    assert line.startswith("float32 is slow on a GPU without TF32: give --dtype bfloat16")
    assert slow_dtype(make_config(gpu, {"dtype": "bfloat16"})) is None
    assert slow_dtype(make_config({"device": "cpu", "dtype": "float32"})) is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert slow_dtype(make_config(gpu, {"dtype": "float32"})) is None


def test_a_run_keeps_its_dtype_and_may_move_to_another_device(tmp_path: Path) -> None:
    """config.toml has the dtype that auto stood for, because the bits depend on it, but not the device."""
    short = ("--rounds", "2", "--local-steps", "1", "--calibration-texts", "8", "--eval-examples", "40")
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert call("run", *short, "--output", whole).exit_code == 0
    text = (whole / "config.toml").read_text()
    assert 'dtype = "float32"\ndevice = "auto"' in text
    assert summary_of(whole)["machine"]["device"] == "cpu"
    # The same run, stopped after its first round, with a file of settings as it was before there was auto.
    assert call("run", *short, "--device", "cpu", "--dtype", "float32", "--output", moved).exit_code == 0
    old = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("capture"))
    (moved / "config.toml").write_text(old.replace('"auto"', '"cpu"', 1))
    for name, kept in (("metrics.jsonl", 2), ("ledger.jsonl", 2), ("gradip.jsonl", 1)):
        (moved / name).write_bytes(b"".join((moved / name).read_bytes().splitlines(keepends=True)[:kept]))
    settings = moved / "config.toml"
    for name, value in (("device", "cuda"), ("backend", "triton")):  # of a machine that has a GPU
        settings.write_text(re.sub(f"{name} = .*", f'{name} = "{value}"', settings.read_text()))
    refused = call("run", "--resume", moved)
    assert refused.exit_code == 1
    assert "device cuda was requested, but torch sees no CUDA or ROCm device; use --device cpu" in refused.output
    resumed = call("run", "--resume", moved, "--dtype", "auto", "--device", "cpu", "--backend", "auto")
    assert resumed.exit_code == 0, resumed.output
    with pytest.raises(ConfigError, match="has other settings; nothing was changed"):
        resume(moved, lambda _: None, lambda _: None, config=make_config({"lr": 0.5}))
    assert summary_of(moved)["weights"] == summary_of(whole)["weights"]
    replayed = call("replay", moved)
    assert "the same bits as at the end of the run" in replayed.output
    assert (moved / "ledger.jsonl").read_bytes() == (whole / "ledger.jsonl").read_bytes()
