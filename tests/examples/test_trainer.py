"""``examples/trainer.py``: stopped after a checkpoint and resumed, it ends on the same model."""

import shutil
from pathlib import Path

import pytest

from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.engine.updates import read_updates

from helpers.examples import fingerprints, run


@pytest.mark.slow
def test_it_ends_on_the_same_model_when_resumed(tmp_path: Path) -> None:
    whole = run("trainer.py", "--steps", 100, "--output", tmp_path)
    best, replayed = fingerprints(whole)
    assert best == replayed != fingerprint(embedded.load().model)
    assert "eval_accuracy" in whole
    updates = read_updates(tmp_path / "checkpoint-100" / "updates.jsonl")
    shutil.rmtree(tmp_path / "checkpoint-100")
    resumed = run("trainer.py", "--steps", 100, "--output", tmp_path, "--resume")
    assert resumed.splitlines()[-2:] == whole.splitlines()[-2:]
    assert read_updates(tmp_path / "checkpoint-100" / "updates.jsonl") == updates
    assert len(updates) == 100
