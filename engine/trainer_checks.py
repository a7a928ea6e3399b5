"""Checks of ``SparseZOTrainer``: arguments it cannot honour, checkpoints that do not fit, processes that differ."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import is_peft_available

from .errors import ConfigError
from .mask import SparseMask
from .optimizer import SparseZO
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


def settings_of(zo: SparseZO) -> dict[str, Any]:
    """Returns the settings that every step of a training uses, by the name of the trainer's argument."""
    group = zo.param_groups[0]
    return {
        "eps": group["eps"],
        "queries": zo.queries,
        "estimator": str(zo.estimator),
        "seed": zo.seed,
        # Before the schedule; schedulers other than "reduce_lr_on_plateau" store it.
        "learning_rate": group.get("initial_lr"),
    }


def check_same_settings(checkpoint: Path | str, loaded: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises ``ConfigError`` if a checkpoint was trained with other settings than the trainer has."""
    for name, value in own.items():
        if loaded[name] != value:
            raise ConfigError(
                f"checkpoint {checkpoint} was trained with {name} {loaded[name]}, this trainer has {value}; resume "
                f"with {loaded[name]}, or start a new training with the checkpoint's model as the base"
            )


def check_is_saved(model: nn.Module, mask: SparseMask) -> None:
    """Raises ``ConfigError`` if ``save_model`` does not save a parameter that has masked elements."""
    addresses = {tensor.data_ptr() for tensor in _saved_tensors(model)}
    parameters = dict(model.named_parameters())
    for name, *_ in mask.ranges():
        # An adapter of prompts is saved as what it computes.
        if parameters[name].data_ptr() not in addresses and not name.startswith("prompt_encoder."):
            raise ConfigError(
                f"parameter {name!r} has masked elements, but save_model saves only the adapters of this model; make "
                f"the mask of the adapters' parameters (SparseMask.of_parameters), or train the model without adapters"
            )


def _saved_tensors(model: Any) -> list[Tensor]:
    """Tensors that ``save_pretrained`` writes, or a state dict where the model has no such method."""
    if is_peft_available():
        from peft import PeftModel, get_peft_model_state_dict

        if isinstance(model, PeftModel):
            adapters = [
                get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
                for name in model.peft_config
            ]
            return [tensor for adapter in adapters for tensor in adapter.values()]
    if getattr(model, "_hf_peft_config_loaded", False):  # adapters that transformers has added
        return list(model.get_adapter_state_dict().values())
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return [tensor for name, tensor in model.state_dict().items() if name not in ignored]


def check_processes(accelerator: Any, model: nn.Module, zo: SparseZO) -> None:
    """Raises ``ConfigError`` on all processes if they do not all have the same model, mask, masters and settings."""
    if accelerator.num_processes == 1:
        return
    settings = hashlib.sha256(json.dumps([settings_of(zo), str(zo.nonfinite)]).encode())
    digest = bytes.fromhex(fingerprint(model) + zo.weights.digest()) + settings.digest()
    own_digest = torch.tensor(list(digest), dtype=torch.int64, device=accelerator.device)
    if (accelerator.gather(own_digest).view(accelerator.num_processes, -1) != own_digest).any():
        raise ConfigError(
            "the processes have different models, masks or settings; load the same model and mask on all of them, and "
            "give all the same arguments"
        )


__all__ = [
    "UPDATES",
    "check_arguments",
    "check_checkpoint",
    "check_is_saved",
    "check_processes",
    "check_same_settings",
    "settings_of",
]
