"""Checks of ``SparseZOTrainer``: arguments it cannot honour, incomplete checkpoints, processes that differ."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from .errors import ConfigError
from .mask import SparseMask
from .parameters import fingerprint

UPDATES = "updates.jsonl"
_CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", UPDATES)

# Arguments about gradients or another optimizer: the value that is allowed besides the default, and the reason to
# reject all others.
_REJECTED: dict[str, tuple[Any, str]] = {
    "fp16": (None, "there is no gradient to scale; load the model in float16, or use bf16"),
    "max_grad_norm": (0, "there is no gradient to clip; lower the learning rate"),
    "weight_decay": (None, "zeroth-order steps have no weight decay"),
    "optim": (None, "the optimizer is SparseZO"),
    "activation_checkpointing": (None, "no activations are kept for a backward pass"),
    "gradient_checkpointing": (None, "no activations are kept for a backward pass"),
    "neftune_noise_alpha": (None, "all forward passes of a step must see the same embeddings"),
    "deepspeed": (None, "every device must hold all masked weights"),
    "fsdp": (None, "every device must hold all masked weights"),
    "parallelism_config": (None, "every device must hold all masked weights"),
}


def check_arguments(args: TrainingArguments) -> None:
    """Checks training arguments.

    Raises:
        ConfigError: for several devices in one process, for arguments about gradients or another optimizer, and for
            ``save_only_model`` with ``load_best_model_at_end``, which would lose the fp32 masters.
    """
    if args.n_gpu > 1:
        raise ConfigError(
            f"SparseZOTrainer trains on one device per process, but this process sees {args.n_gpu}: start it with "
            f"torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    if args.load_best_model_at_end and args.save_only_model:
        raise ConfigError(
            "SparseZOTrainer does not support save_only_model with load_best_model_at_end: the best model's fp32 "
            "masters are read from its optimizer.pt (4 bytes per masked element)"
        )
    for name, (allowed, reason) in _REJECTED.items():
        field = TrainingArguments.__dataclass_fields__.get(name)  # None if this version has no such argument
        value = getattr(args, name, None)
        if field is not None and value and value not in (field.default, allowed):
            raise ConfigError(f"SparseZOTrainer does not support {name} (it is {value!r}): {reason}")


def check_checkpoint(checkpoint: Path | str) -> None:
    """Raises ``ConfigError`` if a checkpoint lacks a file whose absence Trainer would silently ignore."""
    for name in _CHECKPOINT_FILES:
        if not Path(checkpoint, name).is_file():
            raise ConfigError(
                f"checkpoint {checkpoint} has no {name}, so training cannot resume from it; you can start a new "
                f"training with its model as the base"
            )


def check_processes(accelerator: Any, model: nn.Module, mask: SparseMask) -> None:
    """Raises ``ConfigError`` on all processes if they do not all have the same model and mask."""
    if accelerator.num_processes == 1:
        return
    digest = bytes.fromhex(fingerprint(model)) + bytes.fromhex(mask.digest)
    own_digest = torch.tensor(list(digest), device=accelerator.device)
    if (accelerator.gather(own_digest).view(accelerator.num_processes, -1) != own_digest).any():
        raise ConfigError("the processes have different models or masks; load the same model and mask on all of them")


__all__ = ["UPDATES", "check_arguments", "check_checkpoint", "check_processes"]
