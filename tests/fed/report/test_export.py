"""Checkpoints, deltas and model cards of runs, as programs without this package see them."""

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


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def error(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    return result.output


# Hashes what a checkpoint holds, in a process that has transformers alone.
ELSEWHERE = """
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


def elsewhere(*checkpoints: Path) -> list[dict[str, Any]]:
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, checkpoints)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd="/",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
    return found


@dataclass(frozen=True, kw_only=True)
class World:
    """A base model, its data, and a run on them.

    Args:
        arguments: of `run`, but for rounds and output.
        model: as ``--model`` takes it.
        dtype: of the weights.
        run: of three rounds.
    """

    arguments: list[object]
    model: str
    dtype: str
    run: Path


def make_world(root: Path, model: str, dtype: str, *more: object) -> World:
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
    done("run", *arguments, "--rounds", ROUNDS, "--eval-every", 2, "--output", root / "run")
    return World(arguments=arguments, model=model, dtype=dtype, run=root / "run")


@pytest.fixture(
    scope="module", params=[(m, d) for m in ("embedded", "llama") for d in ("float32", "bfloat16")], ids="-".join
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), *request.param)


@pytest.fixture(scope="module")
def llama_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("llama"), "llama", "float32")


def test_checkpoints_have_the_runs_bits_elsewhere(world: World, tmp_path: Path) -> None:
    """The end, a middle round (the live end of a run of that many rounds), the base, and base + delta."""
    done("run", *world.arguments, "--rounds", 2, "--output", tmp_path / "shorter")
    assert "the same bits as at the end" in done(
        "replay", world.run, "--output", tmp_path / "end", "--delta", tmp_path / "delta"
    )
    middle = done("replay", world.run, "--round", 2, "--output", tmp_path / "middle")
    assert f"the ledger goes on to round {ROUNDS}: no fingerprint to compare with" in middle
    done("replay", world.run, "--round", 0, "--output", tmp_path / "base")
    done("apply", tmp_path / "delta", "--model", world.model, "--output", tmp_path / "applied")
    end, middle_, base, applied = elsewhere(*(tmp_path / name for name in ("end", "middle", "base", "applied")))
    summary = summary_of(world.run)
    assert end["weights"] == applied["weights"] == summary["weights"]
    assert middle_["weights"] == summary_of(tmp_path / "shorter")["weights"]
    assert base["weights"] == summary["base"]
    assert len({end["weights"], middle_["weights"], base["weights"]}) == 3
    assert {found["dtype"] for found in (end, middle_, base, applied)} == {f"torch.{world.dtype}"}

    live = replay_run(world.run).lm
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


def test_the_card_says_what_made_the_model(llama_world: World, tmp_path: Path) -> None:
    run = llama_world.run
    done("replay", run, "--output", tmp_path / "film-critic")
    summary = summary_of(run)
    rows = card_rows(tmp_path / "film-critic")
    assert rows["base model"] == f"`{llama_world.model}`"
    assert rows["method"] == f"meerkat, {summary['masked_elements']:,} of {summary['elements']:,} elements"
    assert rows["task"] == f"sst2; data from `{Path(llama_world.model).parent / 'data'}`"
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
    assert card.data.base_model is None  # a directory is no name on the hub
    assert {"meerkat-engine", "meerkat"} <= set(card.data.tags)
    assert card.data.model_name == "film-critic"
    assert [(r.dataset_type, r.dataset_config, r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        ("nyu-mll/glue", "sst2", "accuracy", summary["accuracy_after"]),
        ("nyu-mll/glue", "sst2", "macro-F1", summary["macro_f1_after"]),
    ]


def test_the_card_of_a_round_has_that_rounds_figures(llama_world: World, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (llama_world.run / "metrics.jsonl").read_text().splitlines()]
    for number in (1, 2):  # round 1 was not evaluated, round 2 was
        done("replay", llama_world.run, "--round", number, "--output", tmp_path / str(number))
    one, two = (card_rows(tmp_path / name) for name in "12")
    assert one["accuracy"].endswith("before, not evaluated after")
    assert ModelCard.load(tmp_path / "1" / "README.md").data.eval_results is None
    assert two["accuracy"].endswith(f"before, {lines[2]['accuracy']:.4f} after")
    assert ModelCard.load(tmp_path / "2" / "README.md").data.eval_results[0].metric_value == lines[2]["accuracy"]
    up, down = (sum(line[key] for line in lines[:3]) for key in ("bytes_up", "bytes_down"))
    assert two["bytes sent"] == f"{up:,} by the clients, {down:,} to them"
    assert two["local steps"] == "8 in these rounds"
    assert "replay RUN --round 2 --output DIR" in (tmp_path / "2" / "README.md").read_text()


def test_the_command_on_the_card_makes_the_run_again(llama_world: World, tmp_path: Path) -> None:
    done("replay", llama_world.run, "--output", tmp_path / "out")
    again = (tmp_path / "out" / "README.md").read_text().split("```sh\nmeerkat-engine ")[1].splitlines()[0]
    done(*shlex.split(again.replace("--output RUN", f"--output {tmp_path / 'again'}")))
    assert (tmp_path / "again" / "ledger.jsonl").read_bytes() == (llama_world.run / "ledger.jsonl").read_bytes()


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
def test_commands_say_every_setting(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunConfig] = []

    def note(config: RunConfig, *_: object, **__: object) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "execute", note)
    config = make_config(settings)
    call(*shlex.split(run_command(config))[1:], "--output", "nowhere")
    assert seen == [config]


@pytest.mark.parametrize("method", ["fedavg", "decomfl", "meerkat-vp", "full-fedzo"])
def test_rounds_of_every_kind_of_ledger(method: str, tmp_path: Path) -> None:
    few = ["--local-steps", 2, "--calibration-texts", 16, "--eval-examples", 20, "--method", method, "--vp-steps", 50,
           "--vp-null-paths", 3]  # fmt: skip
    done("run", *few, "--rounds", 2, "--output", tmp_path / "two")
    done("run", *few, "--rounds", 1, "--output", tmp_path / "one")
    done("replay", tmp_path / "two", "--round", 1, "--delta", tmp_path / "delta", "--output", tmp_path / "out")
    delta = Delta.load(tmp_path / "delta")
    assert delta.weights == summary_of(tmp_path / "one")["weights"]
    assert (delta.method, delta.round) == (method, 1)
    done("apply", tmp_path / "delta", "--model", "embedded", "--output", tmp_path / "applied")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "applied"))
    assert a == b
    calibration = {"meerkat-vp": 4 * 50}.get(method, 0)
    steps = summary_of(tmp_path / "one")["steps"] - calibration
    shown = card_rows(tmp_path / "out")["local steps"]
    assert shown == ("at most 2 of each client a round" if method == "fedavg" else f"{steps} in these rounds")


def test_adapters_have_no_delta(tmp_path: Path) -> None:
    done("run", "--method", "lora-fedzo", "--rounds", 1, "--local-steps", 1, "--eval-examples", 20, "--output",
         tmp_path / "r")  # fmt: skip
    output = error("replay", tmp_path / "r", "--delta", tmp_path / "d", "--output", tmp_path / "out")
    assert "lora-fedzo trains adapters, for which a base model has no place, so there is no delta; --output" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r"]
    done("replay", tmp_path / "r", "--output", tmp_path / "out")
    (found,) = elsewhere(tmp_path / "out")
    assert card_rows(tmp_path / "out")["weights fingerprint"] == f"`{found['weights']}`"


def test_rounds_that_are_not_there(llama_world: World, tmp_path: Path) -> None:
    for number in (4, -1):
        assert f"ledger.jsonl holds 3 rounds; round {number} was asked for" in error(
            "replay", llama_world.run, "--round", number, "--output", tmp_path / "out"
        )
    assert not list(tmp_path.iterdir())


def test_directories_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert f"{tmp_path} is no run directory: it has no mask.safetensors and no ledger" in error("replay", tmp_path)
    for name in ("missing", "config.toml"):
        assert f"{name} is no run directory: there is no such directory" in error("replay", tmp_path / name)


def test_a_run_that_did_not_finish_is_exported_with_what_is_known(llama_world: World, tmp_path: Path) -> None:
    shutil.copytree(llama_world.run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    output = done("replay", tmp_path / "run", "--output", tmp_path / "out")
    assert "the run did not finish: no fingerprint to compare with" in output
    rows = card_rows(tmp_path / "out")
    assert rows["bytes sent"] == "not known"
    assert rows["accuracy"] == "not evaluated before, not evaluated after"
    assert rows["weights fingerprint"] == f"`{summary_of(llama_world.run)['weights']}`"


def test_a_base_model_that_was_moved(llama_world: World, tmp_path: Path) -> None:
    shutil.copytree(llama_world.run, tmp_path / "run")
    config = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(config.replace(llama_world.model, "no/where"))
    output = error("replay", tmp_path / "run")
    assert f"({tmp_path / 'run' / 'config.toml'} names it; --model says where it lies now)" in output
    assert "the same bits" in done("replay", tmp_path / "run", "--model", llama_world.model)
    make_model(vocabulary=300, seed=1).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    make_tokenizer("a").save_pretrained(tmp_path / "other")
    assert f"{tmp_path / 'other'} has " in error("replay", tmp_path / "run", "--model", tmp_path / "other")
    done("replay", tmp_path / "run", "--model", llama_world.model, "--delta", tmp_path / "d")
    assert "with fingerprint" in error("apply", tmp_path / "d", "--model", tmp_path / "other", "--output",
                                       tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(llama_world: World, tmp_path: Path) -> None:
    done("replay", llama_world.run, "--delta", tmp_path / "d")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link", "d"):
        for words in (["replay", llama_world.run], ["apply", tmp_path / "d", "--model", llama_world.model]):
            assert f"{name} exists already; choose another place" in error(*words, "--output", tmp_path / name)
        assert f"{name} exists already; choose another place" in error(
            "replay", llama_world.run, "--delta", tmp_path / name
        )
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "empty").iterdir())


def in_a_process(before: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    script = f"import os, resource, signal, sys\n{before}\nfrom meerkat_engine.cli import main\nmain(sys.argv[1:])\n"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_killed_export_leaves_no_checkpoint(llama_world: World, tmp_path: Path) -> None:
    """Killed after the weights were written and before the tokenizer."""
    kill = (
        "import transformers\n"
        "transformers.PreTrainedTokenizerBase.save_pretrained = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = in_a_process(kill, "replay", llama_world.run, "--output", tmp_path / "out")
    assert ran.returncode == -9, ran.stderr
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    assert list(left.rglob("model.safetensors"))  # it was on its way
    done("replay", llama_world.run, "--output", tmp_path / "out")


@pytest.mark.parametrize("words", [11, 5000], ids=["weights", "tokenizer"])
def test_a_full_disk_leaves_nothing_and_is_one_error(llama_world: World, tmp_path: Path, words: int) -> None:
    """Files may not grow beyond a size that the largest, weights or tokenizer, has not room in."""
    base = tmp_path / "base"
    shutil.copytree(llama_world.model, base)
    if words > 11:  # the weights are those of the run, and the tokenizer is larger than they are
        make_tokenizer(" ".join(f"word{i}" for i in range(words))).save_pretrained(base)
    limit = 110_000 if words > 11 else 40_000
    assert ((base / "model.safetensors").stat().st_size < limit) == (words > 11)
    full = f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)"
    ran = in_a_process(full, "replay", llama_world.run, "--model", base, "--output", tmp_path / "out")
    assert ran.returncode == 1
    assert f"Error: cannot write the checkpoint {tmp_path / 'out'}: " in ran.stderr
    assert "File too large" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_places_that_cannot_be_written(llama_world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = error("replay", llama_world.run, "--output", tmp_path / "file" / "out")
    assert f"cannot write the checkpoint {tmp_path / 'file' / 'out'}: " in output
    assert f"cannot write {tmp_path / 'no' / 'd'}: No such file" in error(
        "replay", llama_world.run, "--delta", tmp_path / "no" / "d"
    )
    done("replay", llama_world.run, "--output", tmp_path / "new" / "deeper" / "out")


@pytest.fixture
def coded(llama_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """The world's base in DIR/coded, with code of its own; says whether that ran, and forgets it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    base, proof = tmp_path / "coded", tmp_path / "proof"
    shutil.copytree(llama_world.model, base)
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
        found = proof.exists()
        proof.unlink(missing_ok=True)
        return found

    return ran


def test_code_of_a_model_runs_by_a_flag_alone(coded: Callable[[], bool], llama_world: World, tmp_path: Path) -> None:
    base, refused = tmp_path / "coded", "it needs code of its own; read that, and if you trust it, give --trust-remote-"
    done("replay", llama_world.run, "--delta", tmp_path / "d")
    data = tmp_path / "coded-data"
    shutil.copytree(Path(llama_world.model).parent / "data", data)
    commands: list[list[object]] = [
        ["replay", llama_world.run, "--model", base, "--output", tmp_path / "replayed"],
        ["apply", tmp_path / "d", "--model", base, "--output", tmp_path / "applied"],
        ["mask", "--model", base, "--data-dir", data, "--output", tmp_path / "mask"],
    ]
    for command in commands:
        assert refused in error(*command)
        assert not coded()
        done(*command, "--trust-remote-code")
        assert coded()
    assert refused in error("run", "--model", base, "--task", "sst2", "--data-dir", data, "--output", tmp_path / "r")
    assert not coded()


def test_no_file_can_ask_for_code_to_run(
    coded: Callable[[], bool], llama_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama_world.run, tmp_path / "run")
    config = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(config.replace(llama_world.model, str(tmp_path / "coded")))
    assert "it needs code of its own" in error("replay", tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text(f"trust_remote_code = true\n{config}")
    for command in (["replay", tmp_path / "run"], ["run", "--config", tmp_path / "run" / "config.toml"]):
        assert "unknown setting 'trust_remote_code'" in error(*command)
    assert not coded()
    given: list[object] = []
    monkeypatch.setattr(cli, "execute", lambda *_, trust_remote_code, pool: given.append(trust_remote_code) or {}[0])
    call("run", "--output", tmp_path / "r")
    call("run", "--trust-remote-code", "--output", tmp_path / "r")
    assert given == [False, True]
