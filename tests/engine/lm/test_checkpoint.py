"""Saving checkpoints from Python, without the command line's own checks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meerkat_engine.engine.errors import ConfigError, RunError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.checkpoint import save_checkpoint
from meerkat_engine.engine.lm.models import LanguageModel, load_model
from meerkat_engine.engine.parameters import fingerprint

from helpers.models import make_model, make_tokenizer


@pytest.mark.parametrize("kind", ["empty directory", "file", "dangling link"])
def test_existing_output_is_kept(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    elif kind == "empty directory":
        output.mkdir()
    else:
        output.symlink_to("nowhere")
    before = output.lstat()
    with pytest.raises(ConfigError, match=r"out exists already; choose another place \(nothing was changed\)"):
        save_checkpoint(embedded.load(), output, "# a card")
    assert (output.lstat().st_ino, output.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_checkpoint_that_transformers_rejects_raises_run_error(tmp_path: Path) -> None:
    lm = embedded.load()
    lm.model.generation_config.max_new_tokens = -1  # type: ignore[union-attr]
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*out: .*max_new_tokens"):
        save_checkpoint(lm, tmp_path / "out", "# a card")
    assert not list(tmp_path.iterdir())


def language_model(model: nn.Module) -> LanguageModel:
    return LanguageModel(model, make_tokenizer("a b"), "tiny")


def assert_nothing_saved(lm: LanguageModel, output: Path, message: str) -> None:
    with pytest.raises(RunError, match=message):
        save_checkpoint(lm, output, "# a card")
    assert not list(output.parent.iterdir())


def test_weights_that_a_checkpoint_does_not_give_back_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed weights may be saved divided by their scale: the checkpoint loads without complaint as another model."""
    lm: Any = language_model(make_model())
    save = type(lm.model).save_pretrained

    def save_scaled(self: Any, directory: Path) -> None:
        weights = {name: value / 2 if "up_proj" in name else value for name, value in self.state_dict().items()}
        save(self, directory, state_dict=weights)

    monkeypatch.setattr(type(lm.model), "save_pretrained", save_scaled)
    assert_nothing_saved(lm, tmp_path / "out", "LlamaForCausalLM loads other weights from it; nothing was saved")


def test_a_layer_that_the_config_lacks_is_not_lost(tmp_path: Path) -> None:
    lm: Any = language_model(make_model())
    lm.model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(32))
    assert_nothing_saved(
        lm, tmp_path / "out", r"does not use 1 of the tensors in its weights, among them '.*q_proj.bias"
    )


def test_tokens_that_a_checkpoint_does_not_give_back_are_not_saved(tmp_path: Path) -> None:
    lm = language_model(make_model())
    lm.tokenizer.save_pretrained = lambda directory: make_tokenizer("b a").save_pretrained(directory)
    assert_nothing_saved(lm, tmp_path / "out", "the checkpoint would not give the tokenizer back")


def test_a_model_of_several_dtypes_is_saved(tmp_path: Path) -> None:
    model: Any = make_model(dtype=torch.bfloat16)
    model.model.norm.float()
    save_checkpoint(language_model(model), tmp_path / "out", "# a card")
    loaded: Any = load_model(str(tmp_path / "out"), torch.bfloat16).model
    loaded.model.norm.weight.data = model.model.norm.weight.data
    assert fingerprint(loaded) == fingerprint(model)
