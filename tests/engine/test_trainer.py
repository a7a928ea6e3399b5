"""``SparseZOTrainer`` gives the bits of a plain loop, also when resumed or replayed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from meerkat_engine import UpdateLog, replay
from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.parameters import fingerprint
from meerkat_engine.engine.replay import replay_
from meerkat_engine.engine.weights import MaskedWeights

from helpers.trainers import LR, Batch, TrainerSetup, grouped, loss_share, plain_loop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "zo",
    [{}, {"queries": 3}, {"queries": 2, "estimator": "forward-difference"}],
    ids=["two-point", "queries", "forward-difference"],
)
def test_training_gives_the_bits_of_a_plain_loop(tmp_path: Path, zo: dict[str, Any], dtype: torch.dtype) -> None:
    setup = TrainerSetup(dtype)
    trainer = setup.trainer(tmp_path, zo=zo)
    trainer.train()
    lrs = [LR * (1 - step / 6) for step in range(6)]
    model, losses, opt = plain_loop(setup, grouped(setup.batches[:6], 1), lrs, loss_share, **zo)
    assert fingerprint(setup.model) == fingerprint(model) != fingerprint(embedded.load(dtype).model)
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in logged] == losses
    assert [line["learning_rate"] for line in logged] == pytest.approx(lrs)
    queries = zo.get("queries", 1)
    means = [sum(opt.projected_gradients[i : i + queries]) / queries for i in range(0, 6 * queries, queries)]
    assert [line["projected_gradient"] for line in logged] == means
    assert not any("grad_norm" in line for line in logged)
    assert [g for _, _, g in trainer.update_log.updates] == opt.projected_gradients
    base = embedded.load(dtype).model
    replay(base, setup.mask, trainer.update_log)
    assert fingerprint(base) == fingerprint(model)


def test_gradient_accumulation_does_one_step_on_all_parts(tmp_path: Path) -> None:
    """An epoch has 11 batches: three steps of three parts and one step of two parts."""
    setup = TrainerSetup()
    trainer = setup.trainer(tmp_path, gradient_accumulation_steps=3, num_train_epochs=1, max_steps=-1)
    trainer.train()
    parts = grouped(setup.batches, 3)
    assert [len(parts_of_step) for parts_of_step in parts] == [3, 3, 3, 2]
    model, losses, _ = plain_loop(setup, parts, [LR * (1 - step / 4) for step in range(4)], loss_share)
    assert fingerprint(setup.model) == fingerprint(model)
    assert [line["loss"] for line in trainer.state.log_history if "loss" in line] == losses
    assert trainer.state.global_step == trainer.zo.steps == 4  # type: ignore[union-attr]


def test_mean_losses_are_divided_by_the_number_of_parts(tmp_path: Path) -> None:
    """Trainer does the same if the model does not accept ``num_items_in_batch``."""
    setup = TrainerSetup()
    setup.model.accepts_loss_kwargs = False  # type: ignore[assignment]
    trainer = setup.trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    trainer.train()
    model, losses, _ = plain_loop(
        setup,
        grouped(setup.batches[:6], 2),
        [LR * (1 - step / 3) for step in range(3)],
        lambda model, batch, tokens: model(**batch).loss.double() / 2,
    )
    assert fingerprint(setup.model) == fingerprint(model)
    assert [line["loss"] for line in trainer.state.log_history if "loss" in line] == losses


def hinge(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """A custom loss."""
    target_logits = outputs.logits[:, :-1].gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((1 - target_logits).clamp(min=0) * (labels[:, 1:] != -100)).sum() / num_items_in_batch


def smoothed(model: nn.Module, batch: Batch, tokens: int) -> Tensor:
    """Cross-entropy with label smoothing of 0.2."""
    labels = batch["labels"][:, 1:]
    log_p = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].log_softmax(-1)
    losses = -0.8 * log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) - 0.2 * log_p.mean(-1)
    return (losses * (labels != -100)).sum() / tokens


@pytest.mark.parametrize("which", ["compute_loss_func", "label_smoothing", "bf16"])
def test_custom_loss_label_smoothing_and_autocast(tmp_path: Path, which: str) -> None:
    def custom(model: nn.Module, batch: Batch, tokens: int) -> Tensor:
        outputs = model(**{name: values for name, values in batch.items() if name != "labels"})
        return hinge(outputs, batch["labels"], torch.tensor(tokens))

    def in_bf16(model: nn.Module, batch: Batch, tokens: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_share(model, batch, tokens).float()

    setup = TrainerSetup()
    arguments: dict[str, Any] = {
        "compute_loss_func": {"compute_loss_func": hinge},
        "label_smoothing": {"label_smoothing_factor": 0.2},
        "bf16": {"bf16": True},
    }[which]
    trainer = setup.trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3, **arguments)
    trainer.train()
    loss_of = {"compute_loss_func": custom, "label_smoothing": smoothed, "bf16": in_bf16}[which]
    lrs = [LR * (1 - step / 3) for step in range(3)]
    model, losses, _ = plain_loop(setup, grouped(setup.batches[:6], 2), lrs, loss_of)
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if which == "label_smoothing":  # summed in another order than in Trainer
        assert logged == pytest.approx(losses, rel=1e-4)
        return
    assert logged == losses
    assert fingerprint(setup.model) == fingerprint(model)


def test_training_uses_no_dropout(tmp_path: Path) -> None:
    setup = TrainerSetup()
    for module in setup.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    setup.model.train()  # the mode of a newly built model
    setup.trainer(tmp_path, max_steps=3).train()
    lrs = [LR * (1 - step / 3) for step in range(3)]
    model, _, _ = plain_loop(setup, grouped(setup.batches[:3], 1), lrs, loss_share)
    assert fingerprint(setup.model) == fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_training_gives_the_bits_of_an_uninterrupted_one(tmp_path: Path, dtype: torch.dtype) -> None:
    arguments: dict[str, Any] = {
        "max_steps": 9, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    uninterrupted = TrainerSetup(dtype)
    trainer = uninterrupted.trainer(tmp_path, zo={"queries": 2}, **arguments)
    trainer.train()
    resumed = TrainerSetup(dtype)
    resumed_trainer = resumed.trainer(tmp_path, zo={"queries": 2}, **arguments)
    resumed_trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert fingerprint(resumed.model) == fingerprint(uninterrupted.model)
    assert resumed_trainer.update_log == trainer.update_log
    assert len(resumed_trainer.update_log.updates) == 18
    assert trainer.zo is not None
    assert resumed_trainer.zo is not None
    assert torch.equal(trainer.zo.weights.masters(), resumed_trainer.zo.weights.masters())
    logs_without_times = [
        [
            {k: v for k, v in line.items() if "loss" in k or k in ("step", "epoch", "learning_rate")}
            for line in lines[:-1]
        ]
        for lines in (trainer.state.log_history, resumed_trainer.state.log_history)
    ]
    assert logs_without_times[0] == logs_without_times[1]


def test_resume_true_uses_the_last_checkpoint(tmp_path: Path) -> None:
    uninterrupted, resumed = TrainerSetup(), TrainerSetup()
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    uninterrupted.trainer(tmp_path / "uninterrupted").train()

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    TrainerSetup().trainer(tmp_path, callbacks=[Stop()], **arguments).train()
    trainer = resumed.trainer(tmp_path, **arguments)
    trainer.train(resume_from_checkpoint=True)
    assert fingerprint(resumed.model) == fingerprint(uninterrupted.model)
    assert len(trainer.update_log.updates) == 6


def test_every_saved_model_is_the_base_after_its_updates(tmp_path: Path) -> None:
    setup = TrainerSetup()
    trainer = setup.trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for name, steps in (("checkpoint-4", 4), ("checkpoint-6", 6), ("final", 6)):
        log = UpdateLog.load(tmp_path / name / "updates.jsonl")
        assert len(log.updates) == steps
        base = embedded.load().model
        replay(base, setup.mask, log)
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert fingerprint(saved) == fingerprint(base)
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_best_model_is_loaded_with_its_updates_and_training_continues_from_it(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    setup, scores = TrainerSetup(dtype), iter([1.0, 3.0, 2.0] + [0.0] * 3)
    trainer = setup.trainer(
        tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="score", eval_dataset=setup.rows[:4], compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 4
    best = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", dtype=dtype)
    base = embedded.load(dtype).model
    weights = MaskedWeights(base, setup.mask)
    replay_(weights, trainer.update_log.updates)  # type: ignore[arg-type]
    assert len(trainer.update_log.updates) == 4
    assert fingerprint(setup.model) == fingerprint(base) == fingerprint(best)
    assert trainer.zo is not None
    assert torch.equal(trainer.zo.weights.masters(), weights.masters())  # not the rounded weights
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert [lr for _, lr, _ in trainer.update_log.updates[4:]] == pytest.approx(
        [LR * (1 - step / 6) for step in range(6)]
    )
    # New seeds: none of any earlier step, the steps after the best model included.
    seeds = [stream.step_seed(3, 0, step) for step in (*range(4), *range(6, 12))]
    assert [seed for seed, _, _ in trainer.update_log.updates] == seeds
    base = embedded.load(dtype).model
    replay(base, setup.mask, trainer.update_log)
    assert fingerprint(setup.model) == fingerprint(base) != fingerprint(best)


def test_a_second_training_continues_from_the_weights(tmp_path: Path) -> None:
    setup = TrainerSetup()
    trainer = setup.trainer(tmp_path, max_steps=3)
    trainer.train()
    trainer.train()
    assert len({seed for seed, _, _ in trainer.update_log.updates}) == 6
    base = embedded.load().model
    replay(base, setup.mask, trainer.update_log)
    assert fingerprint(base) == fingerprint(setup.model)


def test_parts_of_an_unfinished_step_are_dropped(tmp_path: Path) -> None:
    """The first training stops between two parts of a step; the second starts without them."""

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    setup = TrainerSetup()
    trainer = setup.trainer(tmp_path, gradient_accumulation_steps=2, max_steps=2, callbacks=[Stop()])
    trainer.train()
    assert trainer.update_log.updates == ()
    trainer.remove_callback(Stop)
    setup.batches.clear()
    trainer.train()
    model, _, _ = plain_loop(setup, grouped(setup.batches[:4], 2), [LR, LR / 2], loss_share)
    assert fingerprint(setup.model) == fingerprint(model)


def test_model_init_restarts_every_training(tmp_path: Path) -> None:
    """Hyperparameter search depends on this."""
    setup = TrainerSetup()
    trainer = setup.trainer(tmp_path, model_init=lambda: embedded.load().model, max_steps=3)
    prints = set()
    for _ in range(2):
        trainer.train()
        prints.add(fingerprint(trainer.model))
        assert len(trainer.update_log.updates) == 3
    assert len(prints) == 1
    assert fingerprint(embedded.load().model) not in prints


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "updates.jsonl"])
def test_incomplete_checkpoint_is_rejected(tmp_path: Path, missing: str) -> None:
    TrainerSetup().trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    (tmp_path / "checkpoint-6" / missing).unlink()
    with pytest.raises(ConfigError, match=f"has no {missing}"):
        TrainerSetup().trainer(tmp_path).train(resume_from_checkpoint=True)
