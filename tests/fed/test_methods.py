"""Every method on every task, with a tiny model, invented examples and a few rounds. The results are printed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from meerkat_engine import SparseMask
from meerkat_engine.cli import main
from meerkat_engine.engine.errors import ConfigError, MaskError
from meerkat_engine.engine.lm.tasks import TASKS, Task
from meerkat_engine.fed import read_ledger
from meerkat_engine.fed.config.run_config import make_config
from meerkat_engine.fed.config.toml import read_toml
from meerkat_engine.fed.methods import Elements, Gradient, Method, Stopping
from meerkat_engine.fed.run.execute import execute
from meerkat_engine.fed.run.replay import replay_run

from helpers.constants import COMBINATION
from helpers.models import make_byte_tokenizer, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*tied weights:UserWarning")

SMALL = {
    "clients": 2, "rounds": 2, "local_steps": 2, "batch_size": 4, "max_length": 192, "lr": 1e-3, "density": 1e-2,
    "calibration_texts": 4, "calibration_batch_size": 2, "calibration_length": 24, "lora_rank": 2, "vp_steps": 4,
    "vp_initial": 2, "vp_later": 2, "vp_null_paths": 3,
}  # fmt: skip


def folders(task: Task) -> list[str]:
    """Names of the task's data folders."""
    return [f"{task.name}_{domain}" for domain in task.domains] or [task.name]


def row(task: Task, number: int) -> dict[str, Any]:
    """An invented example of the task."""
    label: int | bool = number % len(task.label_words)
    words = {field: f"{field} {number} of some words" for field in task.fields}
    return words | {task.label: bool(label) if task.name == "boolq" else label}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, examples of every task, and calibration text."""
    root: Path = tmp_path_factory.mktemp("world")
    tokenizer = make_byte_tokenizer()
    model = make_model(vocabulary=len(tokenizer), positions=256)
    model.save_pretrained(root / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(root / "model")
    for task in TASKS.values():
        for folder in folders(task):
            (root / folder).mkdir()
            for split, count in (("train", 24), ("validation", 12)):
                lines = [json.dumps(row(task, number)) for number in range(count)]
                (root / folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (root / "c4_sample").mkdir()
    texts = [json.dumps({"text": f"text {number} about nothing at all"}) for number in range(8)]
    (root / "c4_sample" / "train.jsonl").write_text("\n".join(texts) + "\n")
    return root


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def start(method: str, task: str = "sst2", **settings: Any) -> dict[str, Any]:
        given = {"model": str(world / "model"), "data_dir": str(world), "task": task, "method": method}
        config = make_config(SMALL | given | settings)
        return execute(config, tmp_path / "r", lambda _: None, lambda _: None)

    return start


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("method", list(Method))
def test_every_method_on_every_task(
    method: Method,
    task: str,
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    summary = run(method, task)
    assert summary["weights"] != summary["base"]
    assert 0 <= summary["accuracy_after"] <= 1
    moved = replay_run(tmp_path / "r")
    assert moved.weights == summary["weights"]
    change = summary["validation_loss_after"] - summary["validation_loss_before"]
    record_property(COMBINATION, [str(method), task, f"{change:+.0e}", summary["masked_elements"]])


def test_the_recipes_of_two_methods_differ() -> None:
    recipes = [method.recipe for method in Method]
    assert len(set(recipes)) == len(recipes)
    assert {recipe.elements for recipe in recipes} == set(Elements)
    assert {recipe.gradient for recipe in recipes} == set(Gradient)
    assert {recipe.stopping for recipe in recipes} == set(Stopping)


@pytest.mark.parametrize("method", [Method.FULL_FEDZO, Method.DECOMFL])
def test_dense_methods_train_all_elements(method: Method, run: Callable[..., dict[str, Any]]) -> None:
    summary = run(method)
    assert summary["masked_elements"] == summary["elements"]
    assert summary["mask_bytes"] == 0


def test_decomfl_sends_one_scalar_per_query(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = run("decomfl")
    assert summary["bytes_up"] == 2 * 2 * (40 + 4 * 2 * 5)
    ledger = read_ledger(tmp_path / "r" / "ledger.jsonl")
    assert ledger.header.terms.queries == 5
    assert ledger.header.terms.gradient is Gradient.FORWARD_DIFFERENCE
    assert [len(line.scalars) for line in ledger.rounds] == [10, 10]


def test_meerkat_fzoo_sends_normalized_scalars(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = run("meerkat-fzoo")
    assert summary["bytes_up"] == 2 * 2 * (40 + 4 * 2 * 8)
    ledger = read_ledger(tmp_path / "r" / "ledger.jsonl")
    assert ledger.header.terms.queries == 8
    assert ledger.header.terms.gradient is Gradient.NORMALIZED_DIFFERENCE
    for line in ledger.rounds:
        for scalars in line.clients.values():  # each step's differences from the mean have the deviation 1
            assert np.std(np.reshape(scalars, (2, 8)), axis=1, ddof=1) == pytest.approx([1, 1], rel=1e-4)


def test_meerkat_fzoo_learns_the_embedded_task_in_the_forwards_of_forty_two_point_steps(tmp_path: Path) -> None:
    settings = {"method": "meerkat-fzoo", "rounds": 3, "local_steps": 3, "partition": "iid", "eval_examples": 100}
    summary = execute(make_config(settings), tmp_path / "r", lambda _: None, lambda _: None)
    assert summary["accuracy_after"] > 0.8 > 0.6 > summary["accuracy_before"]


def test_layer_zo_trains_the_given_layer(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = run("layer-zo", layer="model.layers.0.mlp")
    mask = SparseMask.load(tmp_path / "r" / "mask.safetensors")
    assert {name for name, *_ in mask.ranges()} == {
        f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert summary["mask_source"] == "layer model.layers.0.mlp"


def test_an_unknown_layer_is_an_error(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"layer 'h\.9' has no parameters .* its blocks are model\.layers\.0, model"):
        run("layer-zo", layer="h.9")


def test_lora_on_a_model_without_the_target_modules_is_an_error(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="'query_key_value'"):
        run("lora-fedzo", lora_targets="query_key_value")


def test_lora_runs_are_saved_as_plain_checkpoints(
    run: Callable[..., dict[str, Any]], world: Path, tmp_path: Path
) -> None:
    summary = run("lora-fedzo", lora_targets="q_proj, v_proj", lr=0.1)
    assert summary["masked_elements"] == 2 * (2 * (32 + 32) + 2 * (32 + 16))
    result = CliRunner().invoke(main, ["replay", str(tmp_path / "r"), "--output", str(tmp_path / "checkpoint")])
    assert result.exit_code == 0, result.output
    saved, base = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "checkpoint", world / "model"))
    assert [name for name, _ in saved.named_parameters()] == [name for name, _ in base.named_parameters()]
    changed = {name for name, p in saved.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert changed == {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in range(2) for part in "qv"}


def test_fedavg_averages_weights(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = run("fedavg")
    k = summary["masked_elements"]
    assert summary["bytes_up"] == 2 * 2 * (40 + 4 * k)
    assert summary["bytes_down"] == 2 * 40 + 2 * (40 + 4 * k)
    ledger = read_ledger(tmp_path / "r" / "ledger.jsonl")
    assert all(line.scalars == [] and line.masters is not None and len(line.masters) == k for line in ledger.rounds)
    assert not (tmp_path / "r" / "gradip.jsonl").exists()


def test_fedavg_learns_in_few_steps(tmp_path: Path) -> None:
    """On the embedded task, 10 steps suffice; zeroth-order training takes hundreds."""
    settings = {"method": "fedavg", "rounds": 5, "local_steps": 2, "partition": "iid", "eval_examples": 100}
    summary = execute(make_config(settings), tmp_path / "r", lambda _: None, lambda _: None)
    assert summary["accuracy_after"] > 0.9 > 0.6 > summary["accuracy_before"]


def test_a_fedavg_round_is_the_mean_of_the_clients_weights(federation: Callable[..., Any]) -> None:
    from meerkat_engine.fed.messages import TrainReply

    fed = federation(gradient=Gradient.BACKPROPAGATION, steps=2, lr=0.1)
    replies = [TrainReply.decode(client.handle(fed.server.request(client.id))) for client in fed.clients]
    for reply in replies:
        fed.server.receive(reply.encode())
    fed.server.finish_round()
    sizes = np.array([reply.examples for reply in replies], dtype=np.float64)
    mean = sum(n * reply.masters.astype(np.float64) for n, reply in zip(sizes, replies, strict=True)) / sizes.sum()
    np.testing.assert_allclose(fed.replica.optimizer.weights.masters().numpy(), mean, rtol=1e-6)
    assert fed.server.round == 2


def test_a_mask_file_needs_a_method_with_ranked_elements(world: Path) -> None:
    given = SMALL | {"model": str(world / "model"), "task": "sst2", "mask": "m.safetensors"}
    for method in Method:
        if method.recipe.elements.uses_density:
            make_config(given, {"method": method})
        else:
            with pytest.raises(ConfigError, match="leave the mask file out"):
                make_config(given, {"method": method})


def test_early_stopping_needs_a_mask_with_a_gradient(
    run: Callable[..., dict[str, Any]], world: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    replace(SparseMask.random(model, 0.01, 1), source="mine").save(tmp_path / "mask")
    with pytest.raises(MaskError, match=r"GradIP needs the gradient on pre-training text .* \(mine\)"):
        run("meerkat-vp", mask=str(tmp_path / "mask"))
    assert not (tmp_path / "r").exists()  # so the same output directory can be used again


@pytest.mark.parametrize(
    ("method", "source"),
    [
        ("weight-magnitude", "random, seed 1"),
        ("meerkat", "task"),
        ("task-mask", "magnitude"),
        ("fedavg", "random, seed 2"),
    ],
)
def test_a_mask_file_made_by_another_rule_is_an_error(
    method: str, source: str, run: Callable[..., dict[str, Any]], world: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    replace(SparseMask.random(model, 0.01, 1), source=source).save(tmp_path / "mask")
    with pytest.raises(ConfigError, match="give the method of that name, or another mask"):
        run(method, mask=str(tmp_path / "mask"))


def test_a_task_mask_has_no_gradient_for_gradip(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """GradIP needs the gradient on pre-training text."""
    run("task-mask")
    assert SparseMask.load(tmp_path / "r" / "mask.safetensors").gradient is None
    assert not (tmp_path / "r" / "gradip.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "x"}, "layer has no meaning for meerkat, which trains sensitivity elements"),
        ({"lora_targets": "x"}, "lora_targets has no meaning for meerkat"),
        ({"method": "fedavg", "queries": 2}, "fedavg draws no perturbations; leave queries out"),
        ({"method": "meerkat-fzoo", "queries": 1}, "deviation of a step's losses; queries must be at least 2, got 1"),
        ({"clients_per_round": 5}, r"clients_per_round must be 0 \(all\) to the 4 clients, got 5"),
    ],
    ids=str,
)
def test_settings_without_effect_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(settings)


def test_the_run_directory_records_the_defaults_of_the_method(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run("decomfl")
    assert read_toml(tmp_path / "r" / "config.toml")["queries"] == 5
    assert make_config({"method": "decomfl", "queries": 2}).step.queries == 2
    assert make_config({}).step.lr != make_config({"method": "fedavg"}).step.lr
