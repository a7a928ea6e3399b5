"""``SparseZOTrainer``: the bits of a plain loop, resumed and replayed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from meerkat_engine import replay
from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.engine.replay import replay_
from meerkat_engine.engine.updates import read_updates
from meerkat_engine.engine.weights import MaskedWeights

from helpers.trainers import LR, Batch, Setting, by_items, in_parts, plain_loop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "zo",
    [{}, {"queries": 3}, {"queries": 2, "estimator": "forward-difference"}],
    ids=["two-point", "queries", "one-sided"],
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


def test_no_dropout_while_it_trains(tmp_path: Path) -> None:
    setting = Setting()
    for module in setting.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    setting.model.train()  # as a model is that was not loaded
    setting.trainer(tmp_path, max_steps=3).train()
    lrs = [LR * (1 - step / 3) for step in range(3)]
    model, _, _ = plain_loop(setting, in_parts(setting.batches[:3], 1), lrs, by_items)
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
    second.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert fingerprint(resumed.model) == fingerprint(whole.model)
    assert second.updates == first.updates
    assert len(second.updates) == 18
    assert first.zo is not None
    assert second.zo is not None
    assert torch.equal(first.zo.weights.masters(), second.zo.weights.masters())
    timeless = [
        [
            {k: v for k, v in line.items() if "loss" in k or k in ("step", "epoch", "learning_rate")}
            for line in lines[:-1]
        ]
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
def test_the_best_model_comes_with_its_updates_and_another_training_goes_on_from_it(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    setting, scores = Setting(dtype), iter([1.0, 3.0, 2.0] + [0.0] * 3)
    trainer = setting.trainer(
        tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="score", eval_dataset=setting.rows[:4], compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 4
    best = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", dtype=dtype)
    base = embedded.load(dtype).model
    weights = MaskedWeights(base, setting.mask)
    replay_(weights, trainer.updates)
    assert len(trainer.updates) == 4
    assert fingerprint(setting.model) == fingerprint(base) == fingerprint(best)
    assert trainer.zo is not None
    assert torch.equal(trainer.zo.weights.masters(), weights.masters())  # not those of the model, which are rounded
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert [lr for _, lr, _ in trainer.updates[4:]] == pytest.approx([LR * (1 - step / 6) for step in range(6)])
    # seeds that none of the steps had, those after the best among them
    seeds = [stream.step_seed(3, 0, step) for step in (*range(4), *range(6, 12))]
    assert [seed for seed, _, _ in trainer.updates] == seeds
    base = embedded.load(dtype).model
    replay(base, setting.mask, trainer.updates)
    assert fingerprint(setting.model) == fingerprint(base) != fingerprint(best)


def test_another_training_goes_on_from_the_weights(tmp_path: Path) -> None:
    setting = Setting()
    trainer = setting.trainer(tmp_path, max_steps=3)
    trainer.train()
    trainer.train()
    assert len({seed for seed, _, _ in trainer.updates}) == 6
    base = embedded.load().model
    replay(base, setting.mask, trainer.updates)
    assert fingerprint(base) == fingerprint(setting.model)


def test_parts_of_a_step_that_was_not_taken_are_left_behind(tmp_path: Path) -> None:
    """A training that stops between two parts, and another after it."""

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    setting = Setting()
    trainer = setting.trainer(tmp_path, gradient_accumulation_steps=2, max_steps=2, callbacks=[Stop()])
    trainer.train()
    assert trainer.updates == []
    trainer.remove_callback(Stop)
    setting.batches.clear()
    trainer.train()
    model, _, _ = plain_loop(setting, in_parts(setting.batches[:4], 2), [LR, LR / 2], by_items)
    assert fingerprint(setting.model) == fingerprint(model)


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


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "updates.jsonl"])
def test_a_checkpoint_that_training_cannot_go_on_from(tmp_path: Path, missing: str) -> None:
    Setting().trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    (tmp_path / "checkpoint-6" / missing).unlink()
    with pytest.raises(ConfigError, match=f"has no {missing}"):
        Setting().trainer(tmp_path).train(resume_from_checkpoint=True)
