"""``SparseZOTrainer`` among its surroundings: schedulers, callbacks, several processes, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from meerkat_engine import replay
from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import ConfigError, NonFiniteLossError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.engine.updates import read_updates

from helpers.trainers import LR, Batch, Setting, by_items, plain_loop


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "reduce_lr_on_plateau"])
def test_schedulers_and_evaluation(tmp_path: Path, kind: str) -> None:
    setting = Setting()
    trainer = setting.trainer(
        tmp_path, lr_scheduler_type=kind, warmup_steps=2 if "warmup" in kind else 0, max_steps=4,
        eval_strategy="steps", eval_steps=1, eval_dataset=setting.rows[:8],
        lr_scheduler_kwargs={"patience": 0, "threshold": 10.0, "factor": 0.5} if "plateau" in kind else None,
    )  # fmt: skip
    trainer.train()
    expected = {
        "linear": [LR, LR * 3 / 4, LR / 2, LR / 4],
        "cosine": [LR, LR * 0.8535533905932737, LR / 2, LR * 0.14644660940672624],
        "constant_with_warmup": [0.0, LR / 2, LR, LR],
        # no evaluation is ten times better than the one before: each halves the rate
        "reduce_lr_on_plateau": [LR, LR / 2, LR / 4, LR / 8],
    }[kind]
    assert [lr for _, lr, _ in trainer.updates] == pytest.approx(expected)
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(set(evaluated)) >= 3
    assert evaluated[-1] == trainer.evaluate()["eval_loss"]


def test_callbacks_see_every_step_once(tmp_path: Path) -> None:
    setting, seen = Setting(), []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(("begin", kwargs["optimizer"].optimizer.steps))

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(("step", kwargs["optimizer"].optimizer.steps))

    trainer = setting.trainer(tmp_path, callbacks=[Watch()], max_steps=2)
    trainer.train()
    assert seen == [("begin", 0), ("step", 1), ("begin", 1), ("step", 2)]


def test_dropout_is_off(tmp_path: Path) -> None:
    prints = set()
    for dropout in (0.0, 0.5):
        setting = Setting()
        for layer in setting.model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.attention_dropout = dropout
        setting.trainer(tmp_path, max_steps=2).train()
        prints.add(fingerprint(setting.model))
    assert len(prints) == 1


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        calls.append(None)
        return outputs.logits.mean() * (float("nan") if len(calls) in (3, 4) else 1)

    calls: list[None] = []
    setting = Setting()
    with pytest.raises(NonFiniteLossError):
        setting.trainer(tmp_path, compute_loss_func=loss).train()
    calls.clear()
    setting = Setting()
    trainer = setting.trainer(tmp_path, compute_loss_func=loss, zo={"nonfinite": "skip"}, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path))
    taken = [g == g for _, _, g in read_updates(tmp_path / "updates.jsonl")]
    assert taken == [True, False, True]


def test_a_query_that_is_skipped_has_its_place_among_the_updates(tmp_path: Path) -> None:
    """Three queries a step, of two forwards each: the second of the first step and all of the second are bad."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        calls.append(None)
        return outputs.logits.mean() * (float("nan") if len(calls) in (4, 7, 10, 11) else 1)

    calls: list[None] = []
    setting = Setting()
    trainer = setting.trainer(
        tmp_path, compute_loss_func=loss, zo={"nonfinite": "skip", "queries": 3}, max_steps=3,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    updates = read_updates(tmp_path / "checkpoint-3" / "updates.jsonl")
    assert [g == g for _, _, g in updates] == [True, False, True, False, False, False, True, True, True]
    assert [seed for seed, _, _ in updates] == [stream.step_seed(3, 0, t, j) for t in range(3) for j in range(3)]
    assert [lr for _, lr, _ in updates] == pytest.approx([LR * (1 - t / 3) / 3 for t in range(3) for _ in range(3)])
    logged = [line["projected_gradient"] for line in trainer.state.log_history if "loss" in line]
    assert [g == g for g in logged] == [False, False, True]
    base = embedded.load().model
    replay(base, setting.mask, updates)
    assert fingerprint(base) == fingerprint(setting.model)
    # resumed between them
    calls.extend([None] * 20)
    resumed = Setting()
    again = resumed.trainer(
        tmp_path, compute_loss_func=loss, zo={"nonfinite": "skip", "queries": 3}, max_steps=3,
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert fingerprint(resumed.model) == fingerprint(setting.model)
    assert [str(update) for update in again.updates] == [str(update) for update in updates]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_grad_norm": 0.5}, "max_grad_norm"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"optim": "sgd"}, "optim"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"fp16": True}, "fp16"),
        (
            {
                "save_only_model": True,
                "load_best_model_at_end": True,
                "save_strategy": "steps",
                "eval_strategy": "steps",
                "eval_steps": 2,
                "save_steps": 2,
            },
            "save_only_model",
        ),
    ],
)
def test_arguments_about_gradients_are_refused(tmp_path: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"takes no {named} "):
        Setting().trainer(tmp_path, **arguments)


def test_no_clipping_is_no_reason_to_refuse(tmp_path: Path) -> None:
    Setting().trainer(tmp_path, max_grad_norm=0).train()


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    setting = Setting()
    with pytest.raises(ConfigError, match="makes its optimizer itself"):
        setting.trainer(tmp_path, optimizers=(torch.optim.SGD(setting.model.parameters(), lr=1.0), None))


def test_weights_that_a_launcher_takes_apart_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = transformers.Trainer.create_accelerator_and_postprocess

    def with_fsdp(trainer: transformers.Trainer) -> None:  # accelerate's own takes several GPUs
        made(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", with_fsdp)
    with pytest.raises(ConfigError, match="no DeepSpeed, no FSDP"):
        Setting().trainer(tmp_path)


def test_importing_the_engine_imports_no_trainer() -> None:
    script = (
        "import sys, meerkat_engine; sys.exit('accelerate' in sys.modules or 'transformers.trainer' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_accelerate_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat_engine.engine.trainer.is_accelerate_available", lambda *_: False)
    with pytest.raises(ConfigError, match=r"needs the package accelerate; in a clone .* '\.\[trainer\]'"):
        Setting().trainer(tmp_path)


_WORKER = """
import json, sys
from pathlib import Path
import torch
from meerkat_engine import replay, stream
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.parameters import fingerprint
from helpers.trainers import Setting
out, found = Path(sys.argv[1]), []
for start in (None, str(out / "checkpoint-2")):
    setting = Setting()
    trainer = setting.trainer(out, gradient_accumulation_steps=2, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=start)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    batches = [batch["input_ids"].tolist() for batch in setting.batches]
    found.append([fingerprint(setting.model), trainer.updates, losses, batches])
setting = Setting()
setting.model.lm_head.weight.data += trainer.args.process_index
try:
    setting.trainer(out).train()
except ConfigError as error:
    found.append(str(error))
(out / f"{trainer.args.process_index}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()  # Trainer does not, and gloo's threads then abort one process in a few
"""


@pytest.mark.slow
def test_two_processes_take_one_step_on_the_mean_of_their_losses(tmp_path: Path) -> None:
    """Resumed too; and processes whose models differ are told."""
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    weights, updates, losses, first = found[0][0]
    assert [each[:2] for of in found for each in of[:2]] == [[weights, updates]] * 4
    assert len(updates) == 4
    other = found[1][0][3]
    assert first != other
    setting = Setting()
    by_ids = {tuple(row["input_ids"]): row for row in setting.rows}

    def batch(ids: list[list[int]]) -> Batch:
        pad = setting.tokenizer.pad_token_id
        return setting.collate([by_ids[tuple(i for i in row if i != pad)] for row in ids])

    # of each step the parts of the one process, then those of the other
    parts = [[batch(ids) for ids in (*first[at : at + 2], *other[at : at + 2])] for at in range(0, 8, 2)]
    model, expected, _ = plain_loop(setting, parts, [LR * (1 - step / 4) for step in range(4)], by_items)
    assert losses == expected
    assert weights == fingerprint(model)
    for of in found:
        assert "different models or masks" in of[2]
