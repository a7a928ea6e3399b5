"""``examples/plain_loop.py`` saves files that replay to the model it trained."""

import math
from pathlib import Path

import pytest

from meerkat_engine import SparseMask, UpdateLog, replay
from meerkat_engine.engine import stream
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.parameters import fingerprint

from helpers.examples import fingerprints, run_example


@pytest.mark.slow
def test_saved_files_replay_to_the_trained_model(tmp_path: Path) -> None:
    printed = run_example("plain_loop.py", "--steps", 60, "--output", tmp_path)
    assert "step 50: loss" in printed
    assert "step 60: loss" in printed
    trained, replayed = fingerprints(printed)
    model = embedded.load().model
    log = UpdateLog.load(tmp_path / "updates.jsonl")
    replay(model, SparseMask.load(tmp_path / "mask.safetensors"), log)
    assert fingerprint(model) == trained == replayed != fingerprint(embedded.load().model)
    assert [seed for seed, _, _ in log.updates] == [stream.step_seed(7, 0, step) for step in range(60)]
    cosine = [0.01 * (1 + math.cos(math.pi * step / 60)) / 2 for step in range(60)]
    assert [lr for _, lr, _ in log.updates] == pytest.approx(cosine)
