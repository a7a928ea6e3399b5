"""``SparseZOTrainer`` with schedulers, callbacks and several processes, and what it rejects."""

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

from meerkat_engine import UpdateLog, replay
from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import ConfigError, NonFiniteLossError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.parameters import fingerprint

from helpers.trainers import LR, Batch, TrainerSetup, loss_share, plain_loop


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "reduce_lr_on_plateau"])
def test_schedulers_and_evaluation(tmp_path: Path, kind: str) -> None:
    setup = TrainerSetup()
    trainer = setup.trainer(
        tmp_path, lr_scheduler_type=kind, warmup_steps=2 if "warmup" in kind else 0, max_steps=4,
        eval_strategy="steps", eval_steps=1, eval_dataset=setup.rows[:8],
        lr_scheduler_kwargs={"patience": 0, "threshold": 10.0, "factor": 0.5} if "plateau" in kind else None,
    )  # fmt: skip
    trainer.train()
    expected = {
        "linear": [LR, LR * 3 / 4, LR / 2, LR / 4],
        "cosine": [LR, LR * 0.8535533905932737, LR / 2, LR * 0.14644660940672624],
        "constant_with_warmup": [0.0, LR / 2, LR, LR],
        # no evaluation improves tenfold on the one before, so each halves the rate
        "reduce_lr_on_plateau": [LR, LR / 2, LR / 4, LR / 8],
    }[kind]
    assert [lr for _, lr, _ in trainer.update_log.updates] == pytest.approx(expected)
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(set(evaluated)) >= 3
    assert evaluated[-1] == trainer.evaluate()["eval_loss"]


def test_callbacks_are_called_once_per_step(tmp_path: Path) -> None:
    setup, events = TrainerSetup(), []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append(("begin", kwargs["optimizer"].optimizer.steps))

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append(("step", kwargs["optimizer"].optimizer.steps))

    trainer = setup.trainer(tmp_path, callbacks=[Watch()], max_steps=2)
    trainer.train()
    assert events == [("begin", 0), ("step", 1), ("begin", 1), ("step", 2)]


def test_dropout_probability_has_no_effect(tmp_path: Path) -> None:
    prints = set()
    for dropout in (0.0, 0.5):
        setup = TrainerSetup()
        for layer in setup.model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.attention_dropout = dropout
        setup.trainer(tmp_path, max_steps=2).train()
        prints.add(fingerprint(setup.model))
    assert len(prints) == 1


def test_nonfinite_loss_raises_or_skips(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        calls.append(None)
        return outputs.logits.mean() * (float("nan") if len(calls) in (3, 4) else 1)

    calls: list[None] = []
    setup = TrainerSetup()
    with pytest.raises(NonFiniteLossError):
        setup.trainer(tmp_path, compute_loss_func=loss).train()
    calls.clear()
    setup = TrainerSetup()
    trainer = setup.trainer(tmp_path, compute_loss_func=loss, zo={"nonfinite": "skip"}, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path))
    applied = [g == g for _, _, g in UpdateLog.load(tmp_path / "updates.jsonl").updates]
    assert applied == [True, False, True]


def test_skipped_queries_are_recorded_in_the_updates(tmp_path: Path) -> None:
    """Three queries per step, two forward passes each. Skipped: query 2 of step 1, and all queries of step 2."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        calls.append(None)
        return outputs.logits.mean() * (float("nan") if len(calls) in (4, 7, 10, 11) else 1)

    calls: list[None] = []
    setup = TrainerSetup()
    trainer = setup.trainer(
        tmp_path, compute_loss_func=loss, zo={"nonfinite": "skip", "queries": 3}, max_steps=3,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    log = UpdateLog.load(tmp_path / "checkpoint-3" / "updates.jsonl")
    updates = log.updates
    assert [g == g for _, _, g in updates] == [True, False, True, False, False, False, True, True, True]
    assert [seed for seed, _, _ in updates] == [stream.step_seed(3, 0, t, j) for t in range(3) for j in range(3)]
    assert [lr for _, lr, _ in updates] == pytest.approx([LR * (1 - t / 3) / 3 for t in range(3) for _ in range(3)])
    logged = [line["projected_gradient"] for line in trainer.state.log_history if "loss" in line]
    assert [g == g for g in logged] == [False, False, True]
    base = embedded.load().model
    replay(base, setup.mask, log)
    assert fingerprint(base) == fingerprint(setup.model)
    # Resumed after the step whose queries were all skipped.
    calls.extend([None] * 20)
    resumed = TrainerSetup()
    resumed_trainer = resumed.trainer(
        tmp_path, compute_loss_func=loss, zo={"nonfinite": "skip", "queries": 3}, max_steps=3,
    )  # fmt: skip
    resumed_trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert fingerprint(resumed.model) == fingerprint(setup.model)
    assert resumed_trainer.update_log == log


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
def test_unsupported_arguments_are_rejected(tmp_path: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"does not support {named} "):
        TrainerSetup().trainer(tmp_path, **arguments)


def test_disabled_gradient_clipping_is_accepted(tmp_path: Path) -> None:
    TrainerSetup().trainer(tmp_path, max_grad_norm=0).train()


def test_another_optimizer_is_rejected(tmp_path: Path) -> None:
    setup = TrainerSetup()
    with pytest.raises(ConfigError, match="creates its optimizer itself"):
        setup.trainer(tmp_path, optimizers=(torch.optim.SGD(setup.model.parameters(), lr=1.0), None))


def test_fsdp_of_a_launcher_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_accelerator = transformers.Trainer.create_accelerator_and_postprocess

    def with_fsdp(trainer: transformers.Trainer) -> None:  # real FSDP needs several GPUs
        create_accelerator(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", with_fsdp)
    with pytest.raises(ConfigError, match="does not support DeepSpeed or FSDP"):
        TrainerSetup().trainer(tmp_path)


def test_importing_the_package_does_not_import_trainer() -> None:
    script = (
        "import sys, meerkat_engine; sys.exit('accelerate' in sys.modules or 'transformers.trainer' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_error_without_accelerate_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat_engine.engine.trainer.is_accelerate_available", lambda *_: False)
    with pytest.raises(ConfigError, match=r"needs the package accelerate; in a clone .* '\.\[trainer\]'"):
        TrainerSetup().trainer(tmp_path)


_WORKER = """
import json, sys
from pathlib import Path
import torch
from meerkat_engine import replay, stream
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.parameters import fingerprint
from helpers.trainers import TrainerSetup
out, results = Path(sys.argv[1]), []
for start in (None, str(out / "checkpoint-2")):
    setup = TrainerSetup()
    trainer = setup.trainer(out, gradient_accumulation_steps=2, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=start)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    batches = [batch["input_ids"].tolist() for batch in setup.batches]
    results.append([fingerprint(setup.model), trainer.update_log.updates, losses, batches])
rank = trainer.args.process_index
for shift, zo in ((rank, {}), (0, {"eps": 1e-3 * (1 + rank)}), (0, {"nonfinite": ("raise", "skip")[rank]})):
    setup = TrainerSetup()
    setup.model.lm_head.weight.data += shift
    try:
        setup.trainer(out, zo=zo).train()
    except ConfigError as error:
        results.append(str(error))
(out / f"{trainer.args.process_index}.json").write_text(json.dumps(results))
torch.distributed.destroy_process_group()  # not done by Trainer; without it gloo's threads sometimes abort the process
"""


@pytest.mark.slow
def test_two_processes_step_on_the_mean_of_their_losses(tmp_path: Path) -> None:
    """Also when resumed. Processes with different models or settings raise."""
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    weights, updates, losses, batches_of_rank_0 = results[0][0]
    assert [training[:2] for of_rank in results for training in of_rank[:2]] == [[weights, updates]] * 4
    assert len(updates) == 4
    batches_of_rank_1 = results[1][0][3]
    assert batches_of_rank_0 != batches_of_rank_1
    setup = TrainerSetup()
    rows_by_ids = {tuple(row["input_ids"]): row for row in setup.rows}

    def batch(ids: list[list[int]]) -> Batch:
        pad = setup.tokenizer.pad_token_id
        return setup.collate([rows_by_ids[tuple(i for i in row if i != pad)] for row in ids])

    # Parts of each step: those of rank 0, then those of rank 1.
    parts = [
        [batch(ids) for ids in (*batches_of_rank_0[i : i + 2], *batches_of_rank_1[i : i + 2])] for i in range(0, 8, 2)
    ]
    model, expected, _ = plain_loop(setup, parts, [LR * (1 - step / 4) for step in range(4)], loss_share)
    assert losses == expected
    assert weights == fingerprint(model)
    for of_rank in results:
        assert [error.partition(";")[0] for error in of_rank[2:]] == [
            "the processes have different models, masks or settings"
        ] * 3
