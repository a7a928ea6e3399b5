"""The progress bar on a pseudo-terminal. ``test_run`` checks that there is none without a terminal."""

import re
from pathlib import Path

from helpers.terminal import run_on_terminal


def test_the_bar_shows_round_loss_accuracy_speed_and_bytes(tmp_path: Path) -> None:
    text = run_on_terminal("run", "--rounds", "3", "--local-steps", "2", "--eval-every", "2",
                           "--calibration-texts", "64", "--output", str(tmp_path / "r"))  # fmt: skip
    assert "calibrating" in text
    bars = [line for line in re.split(r"[\r\n]+", text) if "round/s" in line or "s/round" in line]
    last = bars[-1]
    assert "3/3" in last
    assert re.search(r"loss=0\.\d{4}, accuracy=[01]\.\d{4}, steps/s=\d+\.\d\d, bytes=1\.\d kB", last), last
    assert any("1/3" in line for line in bars)
