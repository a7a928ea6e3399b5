"""What ``SparseZOTrainer`` would do other than asked for, or lose, is refused; what rounds away is mended or told."""

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from meerkat_engine import SparseMask, UpdateLog, fingerprint
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.trainer_checks import check_is_saved

from helpers.models import make_model
from helpers.trainers import TrainerSetup

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two of four steps, with two queries a step."""
    out = tmp_path_factory.mktemp("trained")
    trainer = TrainerSetup().trainer(out, zo={"queries": 2}, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    return out / "checkpoint-2"


@pytest.mark.parametrize(
    ("zo", "arguments", "message"),
    [
        ({"eps": 0.1}, {}, "eps is 0.001, this optimizer's is 0.1"),
        ({"queries": 5}, {}, "queries is 2, this optimizer's is 5"),
        ({"estimator": "forward-difference"}, {}, "estimator is 'two-point', this optimizer's is 'forward-difference'"),
        ({}, {"learning_rate": 0.5}, "trained with learning_rate 0.01, this trainer has 0.5; resume with 0.01, or"),
        ({}, {"seed": 4}, "trained with seed 3, this trainer has 4"),
    ],
)
def test_other_settings_than_the_checkpoints_are_refused(
    tmp_path: Path, checkpoint: Path, zo: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    trainer = TrainerSetup().trainer(tmp_path, zo={"queries": 2} | zo, max_steps=4, **arguments)
    with pytest.raises(ConfigError, match=message) as caught:
        trainer.train(resume_from_checkpoint=checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert trainer.state.global_step <= 2  # no step was done
    assert trainer.zo is not None
    assert trainer.zo.log.updates == ()


def test_another_mask_than_the_checkpoints_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    setup = TrainerSetup()
    setup.mask = SparseMask.random(setup.model, 0.01, 2)
    with pytest.raises(ConfigError, match="the state's mask_digest is"):
        setup.trainer(tmp_path, zo={"queries": 2}).train(resume_from_checkpoint=checkpoint)


def test_files_of_two_checkpoints_are_not_mixed(tmp_path: Path, checkpoint: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(checkpoint, mixed)
    shutil.copy(checkpoint.with_name("checkpoint-4") / "updates.jsonl", mixed)
    with pytest.raises(ConfigError, match=r"its updates.jsonl ends at other weights than its optimizer.pt has"):
        TrainerSetup().trainer(tmp_path, zo={"queries": 2}).train(resume_from_checkpoint=mixed)


def test_the_log_names_base_and_mask(tmp_path: Path, checkpoint: Path) -> None:
    setup = TrainerSetup()
    trainer = setup.trainer(tmp_path)
    untrained = trainer.update_log
    log = UpdateLog.load(checkpoint / "updates.jsonl")
    assert (log.mask, log.start) == (setup.mask.digest, untrained.start)
    assert (untrained.updates, untrained.end) == ((), untrained.start)
    trainer.save_model(str(tmp_path / "base"))
    assert UpdateLog.load(tmp_path / "base" / "updates.jsonl") == untrained


class Classifier(nn.Module):
    """Classifies as transformers' models do: the loss has the dtype of the logits."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = make_model(dtype=dtype).requires_grad_(True)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        logits = self.body(input_ids=input_ids).logits[:, -1, :2]
        losses = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return losses | {"logits": logits}


def classification_trainer(out: Path, dtype: torch.dtype, **arguments: Any) -> Any:
    setup, model = TrainerSetup(), Classifier(dtype)
    setup.mask = SparseMask.random(model, 0.02, 1)
    setup.rows = [{"input_ids": [3 + i % 50, 7, 5], "labels": i % 2} for i in range(24)]
    return setup.trainer(out, model=model, data_collator=transformers.default_data_collator, max_steps=3, **arguments)


def loss_in_float32(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"].float(), labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_loss_of_low_precision_is_told_once(tmp_path: Path, dtype: torch.dtype) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classification_trainer(tmp_path, dtype).train()
    told = [str(w.message) for w in caught if "the loss is" in str(w.message)]
    assert len(told) == 1
    assert f"the loss is {dtype}" in told[0]
    assert "in float32" in told[0]


def test_a_loss_of_float_logits_is_not_quantized(tmp_path: Path) -> None:
    """With eps 1e-3 a loss in bfloat16 gives scalars that are multiples of 2**-9 / 2e-3, almost 1."""
    trainer = classification_trainer(tmp_path, torch.bfloat16, compute_loss_func=loss_in_float32)
    trainer.train()  # warnings are errors in the tests
    spacing = 2**-9 / 2e-3
    assert any(abs(g / spacing - round(g / spacing)) > 1e-3 for _, _, g in trainer.update_log.updates)


def test_label_smoothing_computes_in_float32(tmp_path: Path) -> None:
    """In bfloat16, transformers' label smoother adds bfloat16 losses."""
    setup, scalars = TrainerSetup(torch.bfloat16), []
    for label_smoothing_factor in (1e-30, 0.0):  # without a factor the model's own loss, which is in float32
        setup = TrainerSetup(torch.bfloat16)
        trainer = setup.trainer(tmp_path, label_smoothing_factor=label_smoothing_factor, max_steps=1)
        trainer.train()
        scalars.append(trainer.update_log.updates[0][2])
    assert scalars[0] == pytest.approx(scalars[1], abs=2e-3)


def test_a_loss_that_is_no_scalar_is_refused(tmp_path: Path) -> None:
    trainer = classification_trainer(
        tmp_path, torch.float32, compute_loss_func=lambda outputs, labels, **_: outputs["logits"][:, 0]
    )
    with pytest.raises(ConfigError, match=r"compute_loss must return one loss, got a tensor of shape \[4\]"):
        trainer.train()


LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])


def names_of(model: nn.Module, part: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if part in name]


def untied_model() -> nn.Module:
    model = make_model("llama")
    config = type(model.config)(**model.config.to_dict() | {"tie_word_embeddings": False})  # type: ignore[operator,union-attr]
    return type(model)(config)


@pytest.mark.parametrize(
    ("part", "saved"),
    [("lora_B", True), ("modules_to_save", True), ("base_layer", False), ("embed_tokens", False), ("norm", False)],
)
def test_masks_over_what_peft_does_not_save_are_refused(part: str, saved: bool) -> None:
    model = peft.get_peft_model(untied_model(), LORA)
    mask = SparseMask.of_parameters(model, names_of(model, part))
    if saved:
        check_is_saved(model, mask)
        return
    with pytest.raises(ConfigError, match=rf"'base_model.*{part}.* has masked elements, but save_model saves only the"):
        check_is_saved(model, mask)


def test_masks_over_what_an_adapter_added_by_transformers_leaves_out_are_refused() -> None:
    model: Any = untied_model()
    model.add_adapter(dataclasses.replace(LORA, modules_to_save=None))
    check_is_saved(model, SparseMask.of_parameters(model, names_of(model, "lora_B")))
    with pytest.raises(ConfigError, match="save_model saves only the adapters"):
        check_is_saved(model, SparseMask.of_parameters(model, names_of(model, "base_layer")))


def test_a_peft_model_reloads_to_the_trained_weights_or_is_not_trained(tmp_path: Path) -> None:
    setup = TrainerSetup()
    model = peft.get_peft_model(setup.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    setup.mask = SparseMask.of_parameters(model, names_of(model, "lora_A"))
    trainer = setup.trainer(tmp_path, model=model, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = peft.PeftModel.from_pretrained(TrainerSetup().model, tmp_path / "saved")
    assert fingerprint(reloaded) == fingerprint(model)
    setup.mask = SparseMask.of_parameters(model, names_of(model, "embed_tokens"))
    with pytest.raises(ConfigError, match="save_model saves only the adapters"):
        setup.trainer(tmp_path, model=model, zo={"frozen": True}).train()


def test_frozen_parameters_are_trained_only_on_request(tmp_path: Path) -> None:
    setup = TrainerSetup()
    setup.model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        setup.trainer(tmp_path).train()
    setup.trainer(tmp_path, zo={"frozen": True}, max_steps=1).train()
