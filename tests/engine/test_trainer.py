"""``SparseZOTrainer``: the bits of a plain loop, resumed, replayed, and what users of ``Trainer`` count on."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from meerkat_engine import SparseMask, SparseZO, embedded, replay
from meerkat_engine.errors import ConfigError, NonFiniteLossError
from meerkat_engine.parameters import fingerprint
from meerkat_engine.trainer import SparseZOTrainer
from meerkat_engine.updates import read_updates

Batch = dict[str, Tensor]
LR = 1e-2


class Setting:
    """Model, mask, data, and the batches that Trainer asked for, in order."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        lm = embedded.load(dtype)
        self.model, self.tokenizer = lm.model, lm.tokenizer
        self.mask = SparseMask.random(self.model, 0.01, 1)
        self.rows = [dict(self.tokenizer(row["review"])) for row in embedded.rows("train")[:44]]
        self.batches: list[Batch] = []

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        batch = dict(self.tokenizer.pad(rows, return_tensors="pt"))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        self.batches.append({name: values.clone() for name, values in batch.items()})
        return batch

    def trainer(self, out: Path, *, zo: dict[str, Any] | None = None, **arguments: Any) -> SparseZOTrainer:
        """A trainer of this setting; keywords that ``TrainingArguments`` does not know are the trainer's."""
        known = transformers.TrainingArguments.__dataclass_fields__
        chosen = {
            "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1, "learning_rate": LR, "seed": 3,
            "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        } | {name: value for name, value in arguments.items() if name in known}  # fmt: skip
        others = {name: value for name, value in arguments.items() if name not in known}
        return SparseZOTrainer(
            **{"model": None if "model_init" in others else self.model, "data_collator": self.collate} | others,
            args=transformers.TrainingArguments(str(out), **chosen),
            mask=self.mask,
            train_dataset=self.rows,
            **(zo or {}),
        )


def plain_loop(
    setting: Setting, batches: list[list[Batch]], lrs: list[float], loss_of: Callable[..., Tensor], **zo: Any
) -> tuple[nn.Module, list[float], SparseZO]:
    """What the trainer is to come to: steps on these batches, each in parts, on a fresh model."""
    fresh = Setting(next(setting.model.parameters()).dtype)
    opt = SparseZO(fresh.model, setting.mask, lr=LR, seed=3, **zo)
    losses = []
    for parts, lr in zip(batches, lrs, strict=True):
        opt.param_groups[0]["lr"] = lr
        items = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)

        def closure(parts: list[Batch] = parts, items: int = items) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for part in parts:
                total += loss_of(fresh.model, part, items).double()
            return total.float()

        losses.append(opt.step(closure).item())
    return fresh.model, losses, opt


def by_items(model: nn.Module, batch: Batch, items: int) -> Tensor:
    loss: Tensor = model(**batch, num_items_in_batch=torch.tensor(items)).loss
    return loss


def in_parts(batches: list[Batch], size: int) -> list[list[Batch]]:
    return [batches[i : i + size] for i in range(0, len(batches), size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "zo", [{}, {"queries": 3}, {"queries": 2, "estimator": "forward-difference"}], ids=["two-point", "queries", "one-sided"]
)
def test_a_training_has_the_bits_of_a_plain_loop(tmp_path: Path, zo: dict[str, Any], dtype: torch.dtype) -> None:
    setting = Setting(dtype)
    trainer = setting.trainer(tmp_path, zo=zo)
    trainer.train()
    lrs = [LR * (1 - step / 6) for step in range(6)]
    model, losses, opt = plain_loop(setting, in_parts(setting.batches[:6], 1), lrs, by_items, **zo)
    assert fingerprint(setting.model) == fingerprint(model) != fingerprint(embedded.load(dtype).model)
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in logged] == losses
    assert [line["learning_rate"] for line in logged] == pytest.approx(lrs)
    queries = zo.get("queries", 1)
    means = [sum(opt.projected_gradients[i : i + queries]) / queries for i in range(0, 6 * queries, queries)]
    assert [line["projected_gradient"] for line in logged] == means
    assert not any("grad_norm" in line for line in logged)
    assert [g for _, _, g in trainer.updates] == opt.projected_gradients
    base = embedded.load(dtype).model
    replay(base, setting.mask, trainer.updates)
    assert fingerprint(base) == fingerprint(model)


def test_gradient_accumulation_is_one_step_over_all_parts(tmp_path: Path) -> None:
    """An epoch has 11 batches: three steps of three parts, and one of two."""
    setting = Setting()
    trainer = setting.trainer(tmp_path, gradient_accumulation_steps=3, num_train_epochs=1, max_steps=-1)
    trainer.train()
    parts = in_parts(setting.batches, 3)
    assert [len(each) for each in parts] == [3, 3, 3, 2]
    model, losses, _ = plain_loop(setting, parts, [LR * (1 - step / 4) for step in range(4)], by_items)
    assert fingerprint(setting.model) == fingerprint(model)
    assert [line["loss"] for line in trainer.state.log_history if "loss" in line] == losses
    assert trainer.state.global_step == trainer.zo.steps == 4  # type: ignore[union-attr]


def test_losses_that_are_means_are_divided_by_the_number_of_parts(tmp_path: Path) -> None:
    """As Trainer does where the model is not told how many items the batch has."""
    setting = Setting()
    setting.model.accepts_loss_kwargs = False  # type: ignore[assignment]
    trainer = setting.trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    trainer.train()
    model, losses, _ = plain_loop(
        setting,
        in_parts(setting.batches[:6], 2),
        [LR * (1 - step / 3) for step in range(3)],
        lambda model, batch, items: model(**batch).loss.double() / 2,
    )
    assert fingerprint(setting.model) == fingerprint(model)
    assert [line["loss"] for line in trainer.state.log_history if "loss" in line] == losses


def hinge(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """A loss of one's own."""
    right = outputs.logits[:, :-1].gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((1 - right).clamp(min=0) * (labels[:, 1:] != -100)).sum() / num_items_in_batch


def smoothed(model: nn.Module, batch: Batch, items: int) -> Tensor:
    labels = batch["labels"][:, 1:]
    logs = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].log_softmax(-1)
    each = -0.8 * logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) - 0.2 * logs.mean(-1)
    return (each * (labels != -100)).sum() / items


@pytest.mark.parametrize("which", ["compute_loss_func", "label_smoothing", "bf16"])
def test_losses_of_ones_own_label_smoothing_and_autocast(tmp_path: Path, which: str) -> None:
    def own(model: nn.Module, batch: Batch, items: int) -> Tensor:
        outputs = model(**{name: values for name, values in batch.items() if name != "labels"})
        return hinge(outputs, batch["labels"], torch.tensor(items))

    def in_bf16(model: nn.Module, batch: Batch, items: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return by_items(model, batch, items).float()

    setting = Setting()
    arguments: dict[str, Any] = {
        "compute_loss_func": {"compute_loss_func": hinge},
        "label_smoothing": {"label_smoothing_factor": 0.2},
        "bf16": {"bf16": True},
    }[which]
    trainer = setting.trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3, **arguments)
    trainer.train()
    loss_of = {"compute_loss_func": own, "label_smoothing": smoothed, "bf16": in_bf16}[which]
    lrs = [LR * (1 - step / 3) for step in range(3)]
    model, losses, _ = plain_loop(setting, in_parts(setting.batches[:6], 2), lrs, loss_of)
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if which == "label_smoothing":  # computed here in another order
        assert logged == pytest.approx(losses, rel=1e-4)
        return
    assert logged == losses
    assert fingerprint(setting.model) == fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_training_ends_on_the_bits_of_an_uninterrupted_one(tmp_path: Path, dtype: torch.dtype) -> None:
    arguments: dict[str, Any] = {
        "max_steps": 9, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    whole = Setting(dtype)
    first = whole.trainer(tmp_path, zo={"queries": 2}, **arguments)
    first.train()
    resumed = Setting(dtype)
    second = resumed.trainer(tmp_path, zo={"queries": 2}, **arguments)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert fingerprint(resumed.model) == fingerprint(whole.model)
    assert second.updates == first.updates
    assert len(second.updates) == 18
    assert first.zo is not None
    assert second.zo is not None
    assert torch.equal(first.zo.weights.masters(), second.zo.weights.masters())
    timeless = [
        [{k: v for k, v in line.items() if "loss" in k or k in ("step", "epoch", "learning_rate")} for line in lines[:-1]]
        for lines in (first.state.log_history, second.state.log_history)
    ]
    assert timeless[0] == timeless[1]


def test_resuming_from_the_last_checkpoint_of_the_output_directory(tmp_path: Path) -> None:
    whole, resumed = Setting(), Setting()
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole.trainer(tmp_path / "whole").train()

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    Setting().trainer(tmp_path, callbacks=[Stop()], **arguments).train()
    trainer = resumed.trainer(tmp_path, **arguments)
    trainer.train(resume_from_checkpoint=True)
    assert fingerprint(resumed.model) == fingerprint(whole.model)
    assert len(trainer.updates) == 6


def test_every_saved_model_is_its_base_and_the_updates_beside_it(tmp_path: Path) -> None:
    setting = Setting()
    trainer = setting.trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for name, steps in (("checkpoint-4", 4), ("checkpoint-6", 6), ("final", 6)):
        updates = read_updates(tmp_path / name / "updates.jsonl")
        assert len(updates) == steps
        base = embedded.load().model
        replay(base, setting.mask, updates)
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert fingerprint(saved) == fingerprint(base)
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_best_model_comes_with_its_updates(tmp_path: Path, dtype: torch.dtype) -> None:
    setting, scores = Setting(dtype), iter([1.0, 3.0, 2.0, 0.0, 0.0, 0.0])
    trainer = setting.trainer(
        tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="score", eval_dataset=setting.rows[:4], compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 4
    best = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", dtype=dtype)
    assert fingerprint(setting.model) == fingerprint(best)
    assert len(trainer.updates) == 4
    base = embedded.load(dtype).model
    replay(base, setting.mask, trainer.updates)
    assert fingerprint(base) == fingerprint(best)
    assert trainer.zo is not None
    trainer.zo.restore()
    assert fingerprint(setting.model) == fingerprint(best)


def test_another_training_goes_on_from_the_weights(tmp_path: Path) -> None:
    setting = Setting()
    trainer = setting.trainer(tmp_path, max_steps=3)
    trainer.train()
    trainer.train()
    assert len({seed for seed, _, _ in trainer.updates}) == 6
    base = embedded.load().model
    replay(base, setting.mask, trainer.updates)
    assert fingerprint(base) == fingerprint(setting.model)


def test_a_model_made_for_each_training(tmp_path: Path) -> None:
    """``model_init``, as hyperparameter search needs it."""
    setting = Setting()
    trainer = setting.trainer(tmp_path, model_init=lambda: embedded.load().model, max_steps=3)
    prints = set()
    for _ in range(2):
        trainer.train()
        prints.add(fingerprint(trainer.model))
        assert len(trainer.updates) == 3
    assert len(prints) == 1
    assert fingerprint(embedded.load().model) not in prints


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "reduce_lr_on_plateau"])
def test_schedulers_and_evaluation(tmp_path: Path, kind: str) -> None:
    setting = Setting()
    trainer = setting.trainer(
        tmp_path, lr_scheduler_type=kind, warmup_steps=2 if "warmup" in kind else 0, eval_strategy="steps", eval_steps=1,
        eval_dataset=setting.rows[:8], max_steps=4,
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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_grad_norm": 0.5}, "max_grad_norm"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"optim": "sgd"}, "optim"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"fp16": True}, "fp16"),
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


@pytest.mark.parametrize("missing", ["optimizer.pt", "updates.jsonl"])
def test_a_checkpoint_that_training_cannot_go_on_from(tmp_path: Path, missing: str) -> None:
    Setting().trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    (tmp_path / "checkpoint-6" / missing).unlink()
    with pytest.raises(ConfigError, match=f"has no {missing}"):
        Setting().trainer(tmp_path).train(resume_from_checkpoint=True)


def test_importing_the_engine_imports_no_trainer() -> None:
    script = "import sys, meerkat_engine; sys.exit('accelerate' in sys.modules or 'transformers.trainer' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("meerkat_engine.trainer")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.utils.is_accelerate_available", lambda *_: False)
        with pytest.raises(ConfigError, match=r"meerkat-engine\[trainer\]"), contextlib.suppress(ImportError):
            importlib.reload(module)
    importlib.reload(module)


_WORKER = """
import json, sys
from pathlib import Path
from meerkat_engine.errors import ConfigError
from meerkat_engine.parameters import fingerprint
from tests.engine.test_trainer import Setting
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
"""


def test_two_processes_take_one_step_on_the_mean_of_their_losses(tmp_path: Path) -> None:
    """Resumed too; and processes whose models differ are told."""
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
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
