"""A small setup for ``SparseZOTrainer``, and the plain training loop that it is compared with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.trainer import SparseZOTrainer

Batch = dict[str, Tensor]
LR = 1e-2


class TrainerSetup:
    """Model, mask and data of a training.

    Attributes:
        batches: all batches that the data collator has made, in order.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        lm = embedded.load(dtype)
        self.model, self.tokenizer = lm.model, lm.tokenizer
        self.mask = SparseMask.random(self.model, 0.01, 1)
        self.rows = [dict(self.tokenizer(row["review"])) for row in embedded.rows("train")[:44]]
        self.batches: list[Batch] = []

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Pads rows to a batch and records a copy of it."""
        batch = dict(self.tokenizer.pad(rows, return_tensors="pt"))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        self.batches.append({name: values.clone() for name, values in batch.items()})
        return batch

    def trainer(self, out: Path, *, zo: dict[str, Any] | None = None, **arguments: Any) -> SparseZOTrainer:
        """Creates a trainer of this setup.

        Args:
            out: output directory.
            zo: options of the optimizer.
            **arguments: fields of ``TrainingArguments``; all other keywords are passed to the trainer.
        """
        fields = transformers.TrainingArguments.__dataclass_fields__
        training_arguments = {
            "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1, "learning_rate": LR, "seed": 3,
            "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        } | {name: value for name, value in arguments.items() if name in fields}  # fmt: skip
        trainer_arguments = {name: value for name, value in arguments.items() if name not in fields}
        return SparseZOTrainer(
            **{
                "model": None if "model_init" in trainer_arguments else self.model,
                "data_collator": self.collate,
            }
            | trainer_arguments,
            args=transformers.TrainingArguments(str(out), **training_arguments),
            mask=self.mask,
            train_dataset=self.rows,
            **(zo or {}),
        )


def plain_loop(
    setup: TrainerSetup, batches: list[list[Batch]], lrs: list[float], loss_of: Callable[..., Tensor], **zo: Any
) -> tuple[nn.Module, list[float], SparseZO]:
    """Runs the steps that the trainer is expected to do, on a fresh model.

    Args:
        setup: gives mask and dtype.
        batches: the batch of each step, in parts.
        lrs: learning rate of each step.
        loss_of: loss of a part, from model, part and number of predicted tokens in the batch.
        **zo: options of the optimizer.

    Returns:
        The trained model, the loss of each step, and the optimizer.
    """
    fresh = TrainerSetup(next(setup.model.parameters()).dtype)
    opt = SparseZO(fresh.model, setup.mask, lr=LR, seed=3, **zo)
    losses = []
    for parts, lr in zip(batches, lrs, strict=True):
        opt.param_groups[0]["lr"] = lr
        tokens = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)

        def closure(parts: list[Batch] = parts, tokens: int = tokens) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for part in parts:
                total += loss_of(fresh.model, part, tokens).double()
            return total.float()

        losses.append(opt.step(closure).item())
    return fresh.model, losses, opt


def loss_share(model: nn.Module, batch: Batch, tokens: int) -> Tensor:
    """Summed loss of a part divided by the number of predicted tokens in the batch."""
    loss: Tensor = model(**batch, num_items_in_batch=torch.tensor(tokens)).loss
    return loss


def grouped(batches: list[Batch], size: int) -> list[list[Batch]]:
    """Groups consecutive batches; the last group may be smaller than ``size``."""
    return [batches[i : i + size] for i in range(0, len(batches), size)]
