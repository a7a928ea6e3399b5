"""Checkpoints, deltas and model cards of runs, as programs without this package read them."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import dynamic_module_utils

from meerkat_engine import cli
from meerkat_engine.engine.delta import Delta
from meerkat_engine.fed.config.run_config import RunConfig, make_config
from meerkat_engine.fed.report.card import run_command
from meerkat_engine.fed.run.replay import replay_run

from helpers.command import call, summary_of
from helpers.models import make_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*tied weights:UserWarning")

ROUNDS = 3


def succeed(*arguments: object) -> str:
    """Runs a command that must succeed. Returns its output."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments: object) -> str:
    """Runs a command that must fail with one error line. Returns its output."""
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    return result.output


# Program that hashes checkpoints with transformers alone, without this package.
HASH_CHECKPOINTS = """
import hashlib, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = []
for directory in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}\\n".encode())
        digest.update(p.detach().contiguous().view(-1).view(torch.uint8).numpy())
    ids = tokenizer("a good film It was", return_tensors="pt")["input_ids"]
    logits = model(ids).logits.detach().float()
    found.append({"weights": digest.hexdigest(), "dtype": str(model.dtype), "ids": ids.tolist(),
                  "logits": hashlib.sha256(logits.numpy()).hexdigest()})
assert not [name for name in sys.modules if name.split(".")[0] == "meerkat_engine"]
print(json.dumps(found))
"""


def hash_checkpoints(*checkpoints: Path) -> list[dict[str, Any]]:
    """Loads checkpoints in a process without this package.

    Returns:
        For each: fingerprint of the weights, dtype, token ids of a text, and SHA-256 of its logits.
    """
    process = subprocess.run(
        [sys.executable, "-c", HASH_CHECKPOINTS, *map(str, checkpoints)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd="/",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    hashes: list[dict[str, Any]] = json.loads(process.stdout.splitlines()[-1])
    return hashes


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A base model, its data, and a run on them.

    Args:
        arguments: arguments of ``meerkat-engine run``, except rounds and output.
        model: value of ``--model``.
        dtype: dtype of the weights.
        run: directory of a run of three rounds.
    """

    arguments: list[object]
    model: str
    dtype: str
    run: Path


def train(root: Path, model: str, dtype: str, *more: object) -> Trained:
    arguments: list[object] = ["--dtype", dtype, "--local-steps", "2", *more]
    if model == "llama":
        words = "good bad fine poor film It was terrible great the a"
        make_model(vocabulary=300).save_pretrained(root / "model")  # type: ignore[operator]
        make_tokenizer(words).save_pretrained(root / "model")
        texts = ["good film", "bad film", "a fine film", "the poor film"] * 8
        rows = [json.dumps({"sentence": text, "label": (i + 1) % 2}) for i, text in enumerate(texts)]
        for name, lines in (
            ("sst2/train", rows), ("sst2/validation", rows[:8]),
            ("c4_sample/train", [json.dumps({"text": text * 3}) for text in texts]),
        ):  # fmt: skip
            path = root / "data" / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
        model = str(root / "model")
        arguments += ["--model", model, "--task", "sst2", "--data-dir", root / "data", "--batch-size", 4,
                      "--clients", 2, "--density", 0.05, "--lr", 0.05]  # fmt: skip
    else:
        arguments += ["--calibration-texts", 32, "--eval-examples", 40]
    succeed("run", *arguments, "--rounds", ROUNDS, "--eval-every", 2, "--output", root / "run")
    return Trained(arguments=arguments, model=model, dtype=dtype, run=root / "run")


@pytest.fixture(
    scope="module", params=[(m, d) for m in ("embedded", "llama") for d in ("float32", "bfloat16")], ids="-".join
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("trained"), *request.param)


@pytest.fixture(scope="module")
def trained_llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("llama"), "llama", "float32")


def test_transformers_loads_checkpoints_with_the_bits_of_the_run(trained: Trained, tmp_path: Path) -> None:
    """For the last round, a middle round (compared with a run of so many rounds), the base model, and base + delta."""
    succeed("run", *trained.arguments, "--rounds", 2, "--output", tmp_path / "shorter")
    assert "the same bits as at the end" in succeed(
        "replay", trained.run, "--output", tmp_path / "end", "--delta", tmp_path / "delta"
    )
    middle = succeed("replay", trained.run, "--round", 2, "--output", tmp_path / "middle")
    assert f"the ledger continues to round {ROUNDS}; only the last round has a fingerprint to compare with" in middle
    succeed("replay", trained.run, "--round", 0, "--output", tmp_path / "base")
    succeed("apply", tmp_path / "delta", "--model", trained.model, "--output", tmp_path / "applied")
    end, middle_, base, applied = hash_checkpoints(*(tmp_path / name for name in ("end", "middle", "base", "applied")))
    summary = summary_of(trained.run)
    assert end["weights"] == applied["weights"] == summary["weights"]
    assert middle_["weights"] == summary_of(tmp_path / "shorter")["weights"]
    assert base["weights"] == summary["base"]
    assert len({end["weights"], middle_["weights"], base["weights"]}) == 3
    assert {found["dtype"] for found in (end, middle_, base, applied)} == {f"torch.{trained.dtype}"}

    live = replay_run(trained.run).lm
    ids = live.tokenizer("a good film It was", return_tensors="pt")["input_ids"]
    assert end["ids"] == ids.tolist()
    with torch.inference_mode():
        logits = live.model(ids).logits.float()
    assert end["logits"] == sha256(logits.numpy()).hexdigest()
    assert sorted(path.name for path in (tmp_path / "end").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


def card_rows(checkpoint: Path) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in (checkpoint / "README.md").read_text().splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_the_card_describes_the_run(trained_llama: Trained, tmp_path: Path) -> None:
    run = trained_llama.run
    succeed("replay", run, "--output", tmp_path / "film-critic")
    summary = summary_of(run)
    rows = card_rows(tmp_path / "film-critic")
    assert rows["base model"] == f"`{trained_llama.model}`"
    assert rows["method"] == f"meerkat, {summary['masked_elements']:,} of {summary['elements']:,} elements"
    assert rows["task"] == f"sst2; data from `{Path(trained_llama.model).parent / 'data'}`"
    assert rows["rounds"] == "3 of 3 in the ledger"
    assert rows["local steps"] == f"{summary['steps']} in these rounds"
    assert rows["bytes sent"] == f"{summary['bytes_up']:,} by the clients, {summary['bytes_down']:,} to them"
    assert rows["accuracy"] == f"{summary['accuracy_before']:.4f} before, {summary['accuracy_after']:.4f} after"
    assert rows["macro-F1"] == f"{summary['macro_f1_before']:.4f} before, {summary['macro_f1_after']:.4f} after"
    assert rows["base fingerprint"] == f"`{summary['base']}`"
    assert rows["mask digest"] == f"`{summary['mask']}`"
    assert rows["ledger SHA-256"] == f"`{sha256((run / 'ledger.jsonl').read_bytes()).hexdigest()}`"
    assert rows["weights fingerprint"] == f"`{summary['weights']}`"
    card = ModelCard.load(tmp_path / "film-critic" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a directory, so not a name on the hub
    assert {"meerkat-engine", "meerkat"} <= set(card.data.tags)
    assert card.data.model_name == "film-critic"
    assert [(r.dataset_type, r.dataset_config, r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        ("nyu-mll/glue", "sst2", "accuracy", summary["accuracy_after"]),
        ("nyu-mll/glue", "sst2", "macro-F1", summary["macro_f1_after"]),
    ]


def test_the_card_of_a_round_has_the_metrics_of_that_round(trained_llama: Trained, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (trained_llama.run / "metrics.jsonl").read_text().splitlines()]
    for number in (1, 2):  # round 1 was not evaluated, round 2 was
        succeed("replay", trained_llama.run, "--round", number, "--output", tmp_path / str(number))
    one, two = (card_rows(tmp_path / name) for name in "12")
    assert one["accuracy"].endswith("before, not evaluated after")
    assert ModelCard.load(tmp_path / "1" / "README.md").data.eval_results is None
    assert two["accuracy"].endswith(f"before, {lines[2]['accuracy']:.4f} after")
    assert ModelCard.load(tmp_path / "2" / "README.md").data.eval_results[0].metric_value == lines[2]["accuracy"]
    up, down = (sum(line[key] for line in lines[:3]) for key in ("bytes_up", "bytes_down"))
    assert two["bytes sent"] == f"{up:,} by the clients, {down:,} to them"
    assert two["local steps"] == "8 in these rounds"
    assert "replay RUN --round 2 --output DIR" in (tmp_path / "2" / "README.md").read_text()


def test_the_command_on_the_card_reproduces_the_run(trained_llama: Trained, tmp_path: Path) -> None:
    succeed("replay", trained_llama.run, "--output", tmp_path / "out")
    again = (tmp_path / "out" / "README.md").read_text().split("```sh\nmeerkat-engine ")[1].splitlines()[0]
    succeed(*shlex.split(again.replace("--output RUN", f"--output {tmp_path / 'again'}")))
    assert (tmp_path / "again" / "ledger.jsonl").read_bytes() == (trained_llama.run / "ledger.jsonl").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rounds": 20, "lr": 1e-4, "density": 1e-3, "partition": "iid"},
        {"method": "decomfl", "queries": 1, "seed": 2**64 - 1},
        {"model": "some/model", "task": "rte", "data_dir": "a b", "schedule": "cosine", "eps": 1e-05},
        {"model": "m", "data": "d.jsonl", "template": "{text}\n'It' was", "labels": "bad, good", "cut": "text"},
    ],
    ids=str,
)
def test_run_command_gives_all_settings(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunConfig] = []

    def record(config: RunConfig, *_: object, **__: object) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "execute", record)
    config = make_config(settings)
    call(*shlex.split(run_command(config))[1:], "--output", "nowhere")
    assert seen == [config]


@pytest.mark.parametrize("method", ["fedavg", "decomfl", "meerkat-vp", "full-fedzo"])
def test_a_round_is_exported_from_every_kind_of_ledger(method: str, tmp_path: Path) -> None:
    small = ["--local-steps", 2, "--calibration-texts", 16, "--eval-examples", 20, "--method", method, "--vp-steps", 50,
           "--vp-null-paths", 3]  # fmt: skip
    succeed("run", *small, "--rounds", 2, "--output", tmp_path / "two")
    succeed("run", *small, "--rounds", 1, "--output", tmp_path / "one")
    succeed("replay", tmp_path / "two", "--round", 1, "--delta", tmp_path / "delta", "--output", tmp_path / "out")
    delta = Delta.load(tmp_path / "delta")
    assert delta.weights == summary_of(tmp_path / "one")["weights"]
    assert (delta.method, delta.round) == (method, 1)
    succeed("apply", tmp_path / "delta", "--model", "embedded", "--output", tmp_path / "applied")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "applied"))
    assert a == b
    calibration = {"meerkat-vp": 4 * 50}.get(method, 0)
    steps = summary_of(tmp_path / "one")["steps"] - calibration
    shown = card_rows(tmp_path / "out")["local steps"]
    assert shown == ("at most 2 of each client a round" if method == "fedavg" else f"{steps} in these rounds")


def test_a_run_of_adapters_has_a_checkpoint_but_no_delta(tmp_path: Path) -> None:
    succeed("run", "--method", "lora-fedzo", "--rounds", 1, "--local-steps", 1, "--eval-examples", 20, "--output",
         tmp_path / "r")  # fmt: skip
    output = fail("replay", tmp_path / "r", "--delta", tmp_path / "d", "--output", tmp_path / "out")
    assert (
        "lora-fedzo trains adapters, which the base model does not have, so there is no delta; use --output" in output
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r"]
    succeed("replay", tmp_path / "r", "--output", tmp_path / "out")
    (found,) = hash_checkpoints(tmp_path / "out")
    assert card_rows(tmp_path / "out")["weights fingerprint"] == f"`{found['weights']}`"


def test_replay_rejects_rounds_that_the_ledger_does_not_hold(trained_llama: Trained, tmp_path: Path) -> None:
    for number in (4, -1):
        assert f"ledger.jsonl holds 3 rounds; round {number} was requested" in fail(
            "replay", trained_llama.run, "--round", number, "--output", tmp_path / "out"
        )
    assert not list(tmp_path.iterdir())


def test_replay_rejects_directories_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert f"{tmp_path} is not a run directory: it has no mask.safetensors and no ledger" in fail("replay", tmp_path)
    for name in ("missing", "config.toml"):
        assert f"{name} is not a run directory: there is no such directory" in fail("replay", tmp_path / name)


def test_a_run_that_did_not_finish_is_exported_without_metrics(trained_llama: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained_llama.run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    output = succeed("replay", tmp_path / "run", "--output", tmp_path / "out")
    assert "the run did not finish: no fingerprint to compare with" in output
    rows = card_rows(tmp_path / "out")
    assert rows["bytes sent"] == "unknown"
    assert rows["evaluation"] == "none: the metrics are missing"
    assert rows["weights fingerprint"] == f"`{summary_of(trained_llama.run)['weights']}`"


def test_a_base_model_that_was_moved_is_given_by_model(trained_llama: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained_llama.run, tmp_path / "run")
    config = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(config.replace(trained_llama.model, "no/where"))
    output = fail("replay", tmp_path / "run")
    assert f"({tmp_path / 'run' / 'config.toml'} names this model; if it was moved, give --model)" in output
    assert "the same bits" in succeed("replay", tmp_path / "run", "--model", trained_llama.model)
    make_model(vocabulary=300, seed=1).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    make_tokenizer("a").save_pretrained(tmp_path / "other")
    assert f"{tmp_path / 'other'} has " in fail("replay", tmp_path / "run", "--model", tmp_path / "other")
    succeed("replay", tmp_path / "run", "--model", trained_llama.model, "--delta", tmp_path / "d")
    assert "with fingerprint" in fail("apply", tmp_path / "d", "--model", tmp_path / "other", "--output",
                                       tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_replay_and_apply_overwrite_nothing(trained_llama: Trained, tmp_path: Path) -> None:
    succeed("replay", trained_llama.run, "--delta", tmp_path / "d")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link", "d"):
        for words in (["replay", trained_llama.run], ["apply", tmp_path / "d", "--model", trained_llama.model]):
            assert f"{name} exists already; choose another place" in fail(*words, "--output", tmp_path / name)
        assert f"{name} exists already; choose another place" in fail(
            "replay", trained_llama.run, "--delta", tmp_path / name
        )
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "empty").iterdir())


def call_in_process(before: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Runs a command in another process, after some statements."""
    script = f"import os, resource, signal, sys\n{before}\nfrom meerkat_engine.cli import main\nmain(sys.argv[1:])\n"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_killed_export_leaves_no_checkpoint(trained_llama: Trained, tmp_path: Path) -> None:
    """Kills the process after it wrote the weights and before the tokenizer."""
    kill = (
        "import transformers\n"
        "transformers.PreTrainedTokenizerBase.save_pretrained = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = call_in_process(kill, "replay", trained_llama.run, "--output", tmp_path / "out")
    assert process.returncode == -9, process.stderr
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    assert list(left.rglob("model.safetensors"))
    succeed("replay", trained_llama.run, "--output", tmp_path / "out")


@pytest.mark.parametrize("letters", [4, 1000], ids=["weights", "tokenizer"])
def test_a_full_disk_is_one_error_and_leaves_no_files(trained_llama: Trained, tmp_path: Path, letters: int) -> None:
    """The size of files is limited to less than that of the largest file, which is the weights or the tokenizer."""
    base = tmp_path / "base"
    shutil.copytree(trained_llama.model, base)
    if letters > 4:  # makes the tokenizer larger than the weights
        make_tokenizer(" ".join(f"{i:0{letters}}" for i in range(200))).save_pretrained(base)
    limit = 110_000 if letters > 4 else 40_000
    assert ((base / "model.safetensors").stat().st_size < limit) == (letters > 4)
    full = f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)"
    process = call_in_process(full, "replay", trained_llama.run, "--model", base, "--output", tmp_path / "out")
    assert process.returncode == 1
    assert f"Error: cannot write the checkpoint {tmp_path / 'out'}: " in process.stderr
    assert "File too large" in process.stderr
    assert "Traceback" not in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_output_paths_that_cannot_be_written_are_named(trained_llama: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = fail("replay", trained_llama.run, "--output", tmp_path / "file" / "out")
    assert f"cannot write the checkpoint {tmp_path / 'file' / 'out'}: " in output
    assert f"cannot write {tmp_path / 'no' / 'd'}: No such file" in fail(
        "replay", trained_llama.run, "--delta", tmp_path / "no" / "d"
    )
    succeed("replay", trained_llama.run, "--output", tmp_path / "new" / "deeper" / "out")


@pytest.fixture
def coded(trained_llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """The base model in DIR/coded, with Python code. The function returns whether that ran since the last call."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    base, proof = tmp_path / "coded", tmp_path / "proof"
    shutil.copytree(trained_llama.model, base)
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "made-up", "auto_map": classes}))
    (base / "own.py").write_text(
        f"from pathlib import Path\nimport transformers\n\n\nclass Config(transformers.LlamaConfig):\n"
        f"    model_type = 'made-up'\n\n    def __init__(self, **given):\n        Path({str(proof)!r}).touch()\n"
        f"        super().__init__(**given)\n\n\n"
        f"class Model(transformers.LlamaForCausalLM):\n    config_class = Config\n"
    )

    def ran() -> bool:
        exists = proof.exists()
        proof.unlink(missing_ok=True)
        return exists

    return ran


def test_code_of_a_model_only_runs_with_the_flag(
    coded: Callable[[], bool], trained_llama: Trained, tmp_path: Path
) -> None:
    base, message = tmp_path / "coded", "it needs code of its own; read that, and if you trust it, give --trust-remote-"
    succeed("replay", trained_llama.run, "--delta", tmp_path / "d")
    data = tmp_path / "coded-data"
    shutil.copytree(Path(trained_llama.model).parent / "data", data)
    commands: list[list[object]] = [
        ["replay", trained_llama.run, "--model", base, "--output", tmp_path / "replayed"],
        ["apply", tmp_path / "d", "--model", base, "--output", tmp_path / "applied"],
        ["mask", "--model", base, "--data-dir", data, "--output", tmp_path / "mask"],
    ]
    for command in commands:
        assert message in fail(*command)
        assert not coded()
        succeed(*command, "--trust-remote-code")
        assert coded()
    assert message in fail("run", "--model", base, "--task", "sst2", "--data-dir", data, "--output", tmp_path / "r")
    assert not coded()


def test_no_settings_file_can_make_code_run(
    coded: Callable[[], bool], trained_llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained_llama.run, tmp_path / "run")
    config = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(config.replace(trained_llama.model, str(tmp_path / "coded")))
    assert "it needs code of its own" in fail("replay", tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text(f"trust_remote_code = true\n{config}")
    for command in (["replay", tmp_path / "run"], ["run", "--config", tmp_path / "run" / "config.toml"]):
        assert "unknown setting 'trust_remote_code'" in fail(*command)
    assert not coded()
    given: list[object] = []
    monkeypatch.setattr(cli, "execute", lambda *_, trust_remote_code, pool: given.append(trust_remote_code) or {}[0])
    call("run", "--output", tmp_path / "r")
    call("run", "--trust-remote-code", "--output", tmp_path / "r")
    assert given == [False, True]
