"""Saving checkpoints from Python, without the command line's own checks."""

from pathlib import Path

import pytest

from meerkat_engine.engine.errors import ConfigError, RunError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.checkpoint import save_checkpoint


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
