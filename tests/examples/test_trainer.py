"""``examples/trainer.py`` ends with the same model if it is resumed from a checkpoint."""

import shutil
from pathlib import Path

import pytest

from meerkat_engine import UpdateLog
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.parameters import fingerprint

from helpers.examples import fingerprints, run_example


@pytest.mark.slow
def test_resumed_example_ends_with_the_same_model(tmp_path: Path) -> None:
    uninterrupted = run_example("trainer.py", "--steps", 100, "--output", tmp_path)
    best, replayed = fingerprints(uninterrupted)
    assert best == replayed != fingerprint(embedded.load().model)
    assert "eval_accuracy" in uninterrupted
    log = UpdateLog.load(tmp_path / "checkpoint-100" / "updates.jsonl")
    shutil.rmtree(tmp_path / "checkpoint-100")
    resumed = run_example("trainer.py", "--steps", 100, "--output", tmp_path, "--resume")
    assert resumed.splitlines()[-2:] == uninterrupted.splitlines()[-2:]
    assert UpdateLog.load(tmp_path / "checkpoint-100" / "updates.jsonl") == log
    assert len(log.updates) == 100
