"""What ``SparseZOTrainer`` refuses rather than ignores: arguments, checkpoints, processes that differ."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from .errors import ConfigError
from .mask import SparseMask
from .parameters import fingerprint

UPDATES = "updates.jsonl"
_OF_CHECKPOINT = ("optimizer.pt", "scheduler.pt", UPDATES)

# Arguments that say something about gradients or another optimizer, and what they may be beside their defaults.
_MEANINGLESS: dict[str, tuple[Any, str]] = {
    "fp16": (None, "there is no gradient to scale; load the model in float16 instead, or take bf16"),
    "max_grad_norm": (0, "there is no gradient to clip; lower the learning rate"),
    "weight_decay": (None, "a zeroth-order step decays no weight"),
    "optim": (None, "the optimizer is SparseZO"),
    "activation_checkpointing": (None, "no activation is kept for a backward pass"),
    "gradient_checkpointing": (None, "no activation is kept for a backward pass"),
    "neftune_noise_alpha": (None, "the forwards of a step must see the same embeddings"),
    "deepspeed": (None, "the masked weights must be whole on every device"),
    "fsdp": (None, "the masked weights must be whole on every device"),
    "parallelism_config": (None, "the masked weights must be whole on every device"),
}


def check_arguments(args: TrainingArguments) -> None:
    """Raises ``ConfigError`` for several devices, and arguments about gradients, another optimizer or no masters."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"SparseZOTrainer trains on one device a process, this one sees {args.n_gpu}: run it with torchrun, or "
            f"set CUDA_VISIBLE_DEVICES"
        )
    if args.load_best_model_at_end and args.save_only_model:
        raise ConfigError(
            "SparseZOTrainer takes no save_only_model with load_best_model_at_end: the fp32 masters of the best model "
            "are in its optimizer.pt, which has 4 bytes a masked element"
        )
    for name, (also, why) in _MEANINGLESS.items():
        field = TrainingArguments.__dataclass_fields__.get(name)  # none where this version has no such argument
        value = getattr(args, name, None)
        if field is not None and value and value not in (field.default, also):
            raise ConfigError(f"SparseZOTrainer takes no {name} (it is {value!r}): {why}")


def check_checkpoint(checkpoint: Path | str) -> None:
    """Raises ``ConfigError`` for a checkpoint that lacks what Trainer would silently do without."""
    for name in _OF_CHECKPOINT:
        if not Path(checkpoint, name).is_file():
            raise ConfigError(
                f"{checkpoint} has no {name}: a training cannot go on from it, but one may start with its model as the "
                f"base"
            )


def check_processes(accelerator: Any, model: nn.Module, mask: SparseMask) -> None:
    """Raises ``ConfigError`` on all processes if one of them has another model or mask."""
    if accelerator.num_processes == 1:
        return
    digest = bytes.fromhex(fingerprint(model)) + bytes.fromhex(mask.digest)
    mine = torch.tensor(list(digest), device=accelerator.device)
    if (accelerator.gather(mine).view(accelerator.num_processes, -1) != mine).any():
        raise ConfigError("the processes hold different models or masks; load the same on all")


__all__ = ["UPDATES", "check_arguments", "check_checkpoint", "check_processes"]
