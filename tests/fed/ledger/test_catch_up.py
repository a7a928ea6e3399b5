"""A client that was away catches up from files, the smaller way, to the same bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from meerkat_engine import SparseMask
from meerkat_engine.engine.errors import LedgerError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.fed import Replica, catch_up, read_ledger

from helpers.command import call
from helpers.federation import Federation


@pytest.fixture(scope="module", params=["meerkat", "fedavg"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen rounds, with a snapshot after the twelfth."""
    path = tmp_path_factory.mktemp("joining") / "run"
    settings = ["--rounds", "14", "--local-steps", "2", "--calibration-texts", "32", "--eval-examples", "20",
                "--snapshot-every", "12", "--method", request.param]  # fmt: skip
    result = call("run", *settings, "--output", path)
    assert result.exit_code == 0, result.output
    return path


def newcomer(run: Path) -> Replica:
    model = embedded.load().model
    return Replica(
        model, SparseMask.load(run / "mask.safetensors", model), read_ledger(run / "ledger.jsonl").header.terms
    )


def end_of(run: Path) -> str:
    found: str = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["summary"]["weights"]
    return found


def test_from_the_ledger_alone(run: Path) -> None:
    late = newcomer(run)
    assert not catch_up(late, run / "ledger.jsonl")
    assert late.round == 15
    assert fingerprint(late.model) == end_of(run)


@pytest.mark.parametrize("run", ["meerkat"], indirect=True)  # the ledger of fedavg has the masters itself
def test_the_smaller_way_is_taken(run: Path) -> None:
    """838 masters are 3.6 kB: less than twelve rounds of the ledger, more than six."""
    snapshot = run / "snapshot.safetensors"
    ledger = read_ledger(run / "ledger.jsonl")
    assert ledger.byte_length(7, 12) < snapshot.stat().st_size < ledger.byte_length(1, 12)
    assert ledger.byte_length(1, 14) == (run / "ledger.jsonl").stat().st_size - ledger.ends[0]
    for known, by_snapshot in ((0, True), (6, False), (12, False), (14, False)):
        late = newcomer(run)
        late.apply_rounds([line.scalars for line in ledger.rounds[:known]])
        assert catch_up(late, run / "ledger.jsonl", snapshot) is by_snapshot
        assert late.round == 15
        assert fingerprint(late.model) == end_of(run)


def test_what_does_not_fit_is_refused(run: Path, tmp_path: Path, federation: Callable[..., Federation]) -> None:
    stranger = federation().replica
    with pytest.raises(LedgerError, match="of a federation with other terms"):
        catch_up(stranger, run / "ledger.jsonl")
    shutil.copy(run / "ledger.jsonl", tmp_path)
    lines = (tmp_path / "ledger.jsonl").read_bytes().splitlines(True)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines[:3]))
    late = newcomer(run)
    catch_up(late, run / "ledger.jsonl")
    with pytest.raises(LedgerError, match="ends with round 2; the replica stands at round 15 already"):
        catch_up(late, tmp_path / "ledger.jsonl")
