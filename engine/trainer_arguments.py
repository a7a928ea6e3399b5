"""Which of ``TrainingArguments`` say nothing to a zeroth-order training, and are refused rather than ignored."""

from typing import Any

from transformers import TrainingArguments

from .errors import ConfigError

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
    """Raises ``ConfigError`` for the first argument about gradients or another optimizer, and for several devices."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"SparseZOTrainer trains on one device a process, this one sees {args.n_gpu}: run it with torchrun, or "
            f"set CUDA_VISIBLE_DEVICES"
        )
    for name, (also, why) in _MEANINGLESS.items():
        field = TrainingArguments.__dataclass_fields__.get(name)  # none where this version has no such argument
        value = getattr(args, name, None)
        if field is not None and value and value not in (field.default, also):
            raise ConfigError(f"SparseZOTrainer takes no {name} (it is {value!r}): {why}")


__all__ = ["check_arguments"]
