"""Catching up from ledger and snapshot: the smaller of the two is used, and the weights have the same bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from meerkat_engine import SparseMask
from meerkat_engine.engine.errors import LedgerError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.fed import Replica, catch_up, read_ledger

from helpers.command import call
from helpers.federation import Federation


@pytest.fixture(scope="module", params=["meerkat", "fedavg"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fourteen rounds with a snapshot after the twelfth."""
    path = tmp_path_factory.mktemp("joining") / "run"
    settings = ["--rounds", "14", "--local-steps", "2", "--calibration-texts", "32", "--eval-examples", "20",
                "--snapshot-every", "12", "--method", request.param]  # fmt: skip
    result = call("run", *settings, "--output", path)
    assert result.exit_code == 0, result.output
    return path


def base_replica(run: Path) -> Replica:
    """A replica of the run's base model, at round 1."""
    model = embedded.load().model
    return Replica(
        model, SparseMask.load(run / "mask.safetensors", model), read_ledger(run / "ledger.jsonl").header.terms
    )


def final_weights(run: Path) -> str:
    """Fingerprint of the weights at the end of the run."""
    weights: str = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["summary"]["weights"]
    return weights


def test_catching_up_from_the_ledger_alone(run: Path) -> None:
    replica = base_replica(run)
    assert not catch_up(replica, run / "ledger.jsonl")
    assert replica.round == 15
    assert fingerprint(replica.model) == final_weights(run)


@pytest.mark.parametrize("run", ["meerkat"], indirect=True)  # the ledger of fedavg contains the masters
def test_the_snapshot_is_used_only_if_it_is_smaller_than_the_ledger_lines(run: Path) -> None:
    """The snapshot of 838 masters has 3.6 kB: less than twelve ledger lines, more than six."""
    snapshot = run / "snapshot.safetensors"
    ledger = read_ledger(run / "ledger.jsonl")
    assert ledger.byte_length(7, 12) < snapshot.stat().st_size < ledger.byte_length(1, 12)
    assert ledger.byte_length(1, 14) == (run / "ledger.jsonl").stat().st_size - ledger.ends[0]
    for applied, used_snapshot in ((0, True), (6, False), (12, False), (14, False)):
        replica = base_replica(run)
        replica.apply_rounds([line.scalars for line in ledger.rounds[:applied]])
        assert catch_up(replica, run / "ledger.jsonl", snapshot) is used_snapshot
        assert replica.round == 15
        assert fingerprint(replica.model) == final_weights(run)


def test_a_ledger_of_other_terms_or_one_that_ends_too_early_is_an_error(
    run: Path, tmp_path: Path, federation: Callable[..., Federation]
) -> None:
    replica_with_other_terms = federation().replica
    with pytest.raises(LedgerError, match="belongs to a federation with other terms"):
        catch_up(replica_with_other_terms, run / "ledger.jsonl")
    other_base = base_replica(run)
    embedding = other_base.model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        embedding.weight[-1] += 1
    other_base.optimizer.restore()
    with pytest.raises(LedgerError, match="starts from a base model with fingerprint"):
        catch_up(other_base, run / "ledger.jsonl")
    shutil.copy(run / "ledger.jsonl", tmp_path)
    lines = (tmp_path / "ledger.jsonl").read_bytes().splitlines(True)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines[:3]))
    replica = base_replica(run)
    catch_up(replica, run / "ledger.jsonl")
    with pytest.raises(LedgerError, match="ends with round 2, the replica is already at round 15"):
        catch_up(replica, tmp_path / "ledger.jsonl")
