"""Runs beside read-only weights: the ledger of a run in place, replay to the same bits, resuming, and exports."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.models import load_model
from meerkat_engine.engine.lm.quantize import Quantize
from meerkat_engine.engine.parameters import fingerprint

from helpers.command import call, summary_of
from helpers.killing import contents

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SETTINGS = ("--rounds", 2, "--local-steps", 2, "--clients", 2, "--batch-size", 4, "--eval-examples", 20,
            "--calibration-texts", 8, "--snapshot-every", 1)  # fmt: skip
PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao-int8": "torchao"}
# A kind that needs no package, and one that changes the weights.
KINDS = ["as-stored", "nf4"]
METHODS: dict[str, tuple[object, ...]] = {
    "meerkat": (),
    "lora-fedzo": (),
    "fedavg": (),
    "task-mask": (),
    "decomfl": (),
    "full-fedzo": (),
    "meerkat-vp": ("--vp-steps", 6, "--vp-initial", 2, "--vp-later", 2),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes runs, each once."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(kind: str, method: str = "meerkat", *more: object) -> Path:
        if kind in PACKAGES:
            pytest.importorskip(PACKAGES[kind], reason="needs the extra quantize")
        path = folder / "-".join(map(str, (kind, method, *more)))
        if not path.exists():
            settings = (*SETTINGS, *METHODS[method], *more)
            result = call("run", *settings, "--quantize", kind, "--method", method, "--output", path)
            assert result.exit_code == 0, result.output
        return path

    return make


def replayed(path: Path, *more: object) -> str:
    """Replays a run. Returns the fingerprint of the weights."""
    result = call("replay", path, *more)
    assert result.exit_code == 0, result.output
    assert "the same bits as at the end of the run" in result.output
    found = re.search(r"weights ([0-9a-f]{64})", result.output)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("kind", list(Quantize))
def test_every_kind_replays_to_its_bits(run: Callable[..., Path], kind: str) -> None:
    path = run(kind)
    weights = replayed(path)
    assert weights == replayed(path)
    is_exact = kind in ("none", "as-stored")
    assert (weights == replayed(run("none"))) == is_exact
    assert ((path / "ledger.jsonl").read_bytes() == (run("none") / "ledger.jsonl").read_bytes()) == is_exact
    assert f'quantize = "{kind}"' in (path / "config.toml").read_text()


@pytest.mark.parametrize(
    "setting", [(method,) for method in METHODS] + [("meerkat", "--dtype", "bfloat16")], ids=" ".join
)
def test_weights_as_stored_give_the_ledger_of_weights_in_place(run: Callable[..., Path], setting: tuple[str]) -> None:
    kept, plain = (run(kind, *setting) for kind in ("as-stored", "none"))
    assert (kept / "ledger.jsonl").read_bytes() == (plain / "ledger.jsonl").read_bytes()
    assert replayed(kept) == replayed(plain)
    names = ("accuracy_after", "loss_after")
    assert [summary_of(kept).get(name) for name in names] == [summary_of(plain).get(name) for name in names]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_beside_quantized_weights(run: Callable[..., Path], method: str) -> None:
    path = run("nf4", method)
    assert replayed(path) != replayed(run("none", method))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["meerkat", "lora-fedzo", "fedavg"])
def test_a_checkpoint_of_a_run_is_what_the_run_computed_with(
    run: Callable[..., Path], kind: str, method: str, tmp_path: Path
) -> None:
    path = run(kind, method)
    weights = replayed(path, "--output", tmp_path / "model")
    model = load_model(str(tmp_path / "model")).model
    if method != "lora-fedzo":  # there adapters are merged
        assert fingerprint(model) == weights
    if kind == "as-stored":
        replayed(run("none", method), "--output", tmp_path / "plain")
        files = (tmp_path / name / "model.safetensors" for name in ("model", "plain"))
        assert next(files).read_bytes() == next(files).read_bytes()
    assert all(p.requires_grad for p in model.parameters())
    of_task = ("--task", "embedded", "--eval-examples", 20)
    assert scores("evaluate", path) == scores("evaluate", tmp_path / "model", *of_task)
    text = ("--text", "the film was great")
    assert scores("predict", path, *text) == scores("predict", tmp_path / "model", "--task", "embedded", *text)


def scores(*command: object) -> list[str]:
    """The last column of the table that a command prints: the trained model's."""
    result = call(*command)
    assert result.exit_code == 0, result.output
    rows = [line.removesuffix(" *").split() for line in result.output.splitlines()]
    found = [row[-1] for row in rows if row and re.fullmatch(r"\d\.\d{4}", row[-1])]
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_gives_the_weights_of_the_run(run: Callable[..., Path], kind: str, tmp_path: Path) -> None:
    weights = replayed(run(kind), "--delta", tmp_path / "delta")
    result = call("apply", tmp_path / "delta", "--model", "embedded", "--output", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert fingerprint(load_model(str(tmp_path / "model")).model) == weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_resumes_to_the_same_files(run: Callable[..., Path], kind: str, tmp_path: Path) -> None:
    finished, stopped = run(kind), tmp_path / "run"
    shutil.copytree(finished, stopped)
    for name, lines in (("ledger.jsonl", 2), ("metrics.jsonl", 2), ("gradip.jsonl", 1)):
        (stopped / name).write_bytes(b"".join((stopped / name).read_bytes().splitlines(True)[:lines]))
    (stopped / "snapshot.safetensors").unlink()
    result = call("run", "--resume", stopped)
    assert result.exit_code == 0, result.output
    assert "resuming after round 1" in result.output
    assert contents(stopped) == contents(finished)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_to_the_same_files(tmp_path: Path, kind: str) -> None:
    settings = ("method=meerkat", "rounds=3", "local_steps=2", "eval_examples=20", "calibration_texts=8",
                "clients=2", f"quantize={kind}", "snapshot_every=1")  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-m", "helpers.killing", str(tmp_path), "write", "2", "5", *settings],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout.splitlines()[-1])["kills"] >= 2


def test_a_model_that_is_loaded_twice_has_one_fingerprint() -> None:
    for kind in Quantize:
        if kind in PACKAGES:
            pytest.importorskip(PACKAGES[kind], reason="needs the extra quantize")
        assert fingerprint(embedded.load(quantize=kind).model) == fingerprint(embedded.load(quantize=kind).model)
