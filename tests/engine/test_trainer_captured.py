"""The Trainer's steps as CUDA graphs, which are imitated."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from meerkat_engine import SparseMask, SparseZOTrainer

from helpers.graphs import ImitatedGraphs
from helpers.regression import make_mlp
from helpers.tensors import flat_weights, same_bits


class Regression(nn.Module):
    """A model without a search for padding, which would read values on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = make_mlp()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.mlp(x)[:, 0]
        return {"loss": (logits - labels).square().mean(), "logits": logits}


class ReadingRegression(Regression):
    """A model that reads values on the host."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        assert x.sum().item() < 1e9
        return super().forward(x, labels)


def make_trainer(out: Path, model: nn.Module, steps: int = 6, **zo: object) -> SparseZOTrainer:
    rows = [{"x": torch.linspace(-1, 1, 8) * i, "labels": torch.tensor(float(i % 3))} for i in range(24)]
    arguments = transformers.TrainingArguments(
        str(out), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps, learning_rate=0.05,
        seed=3, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    mask = SparseMask.random(model, 0.3, seed=1)
    trainer = SparseZOTrainer(model=model, args=arguments, mask=mask, train_dataset=rows, **zo)
    trainer.create_optimizer()
    return trainer


def test_a_training_with_graphs_has_the_bits_of_one_without(tmp_path: Path) -> None:
    trainers = [make_trainer(tmp_path, Regression(), capture=capture) for capture in ("auto", "off")]
    for trainer in trainers:
        assert trainer.zo is not None
        ImitatedGraphs(trainer.zo)
        trainer.train()
    captured, plain = trainers
    assert (captured.zo.captured_steps, plain.zo.captured_steps) == (5, 0)  # type: ignore[union-attr]
    assert captured.zo.not_captured is None  # type: ignore[union-attr]
    assert captured.zo.projected_gradients == plain.zo.projected_gradients  # type: ignore[union-attr]
    assert same_bits(flat_weights(captured.model), flat_weights(plain.model))


def test_a_training_whose_loss_cannot_be_captured_says_why(tmp_path: Path) -> None:
    trainers = [make_trainer(tmp_path, model) for model in (ReadingRegression(), Regression())]
    assert trainers[0].zo is not None
    ImitatedGraphs(trainers[0].zo)
    with pytest.warns(
        UserWarning, match="not captured as a CUDA graph: recording it raised RuntimeError: operation not"
    ):
        trainers[0].train()
    trainers[1].train()
    assert trainers[0].zo.captured_steps == 0
    assert same_bits(flat_weights(trainers[0].model), flat_weights(trainers[1].model))
