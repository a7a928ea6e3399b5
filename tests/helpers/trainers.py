"""A small setting for ``SparseZOTrainer``, and the plain loop that it is measured against."""

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
