"""Low-rank adapters: added to a model in place for training, and merged into its weights afterwards.

    y = W x + (alpha / rank) * B A x,    A [rank, in] random, B [out, rank] zero, so that outputs are unchanged at first

The model keeps its class and head. For zeroth-order fine-tuning of the adapters, pass the names that ``add_lora``
returns to ``SparseMask.of_parameters``.

References:
    LoRA, arXiv 2106.09685, section 4.1; with zeroth-order steps MeZO, arXiv 2305.17333, section 3.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import stream
from ..errors import ConfigError
from ..extras import install_hint
from ..frozen.freeze import thaw
from ..parameters import floating_parameters

_NAME = "default"


def add_lora(
    model: nn.Module, *, rank: int = 8, alpha: float = 16, targets: Sequence[str] = (), seed: int
) -> list[str]:
    """Adds adapters to linear layers of a model. The model's outputs do not change.

    B is zero. A is normal with standard deviation ``1 / sqrt(3 in)``, that of peft's uniform default. It is drawn from
    the project's stream, so equal seeds give equal bits. The adapters have the dtype and device of their layers.
    Afterwards the adapters require gradients, and no other parameter does.

    Args:
        model: a transformers model; the target layers are replaced by layers with adapters.
        rank: rank of the adapters, at least 1.
        alpha: numerator of the adapters' scale ``alpha / rank``; positive and finite.
        targets: names of the target layers, or the last parts of their names ("q_proj"); empty for peft's default
            targets of the architecture.
        seed: seed of A, in [0, 2**64).

    Returns:
        Names of the adapters' parameters, as in ``model.named_parameters()``.

    Raises:
        ConfigError: if peft is missing, rank or alpha is out of range, the model has adapters already, no layer has one
            of the target names, a target is not a linear layer, or peft has no default targets for the architecture.
    """
    peft = _peft()
    if rank < 1 or not 0 < alpha < math.inf:
        raise ConfigError(f"LoRA needs a rank of at least 1 and a positive alpha, got rank {rank} and alpha {alpha}")
    if next(_adapted_layers(model), None) is not None:
        raise ConfigError("the model has adapters already; call merge_lora to merge them into its weights")
    stream.check_seed(seed)
    targets = list(targets) or _default_targets(model, peft)
    _check_targets(model, targets)
    training = model.training
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    # peft draws from torch's generator, and makes adapters on torch's default device
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft warns when it corrects this setting itself
        peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
    _initialize(model, stream.derived_seed(seed, "lora"))
    model.train(training)
    prefixes = [f"{name}." for name, _ in _adapted_layers(model)]
    adapters = [
        name
        for name, _ in floating_parameters(model)
        if any(name.startswith(prefix) and not name.startswith(f"{prefix}base_layer.") for prefix in prefixes)
    ]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapters)
    return adapters


def merge_lora(model: nn.Module) -> None:
    """Merges the adapters into the weights of their layers and removes them, which leaves a plain model.

    Frozen weights become plain ones in these layers.

    Args:
        model: a model with adapters of ``add_lora``; its weights are changed.

    Raises:
        ConfigError: if the model has no adapters, or peft is missing.
    """
    layers = list(_adapted_layers(model))
    if not layers:
        raise ConfigError("the model has no adapters to merge; add_lora adds them")
    with torch.no_grad():
        for name, layer in layers:
            thaw(layer.get_base_layer())
            layer.merge(adapter_names=[_NAME])
            model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _peft() -> Any:
    """Imports peft; raises ``ConfigError`` if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"LoRA needs the package peft ({error}); {install_hint('lora')}") from error
    return peft


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields name and module of every layer with an adapter."""
    adapted = _peft().tuners.lora.LoraLayer
    return ((name, module) for name, module in model.named_modules() if isinstance(module, adapted))


def _default_targets(model: nn.Module, peft: Any) -> list[str]:
    """Returns peft's default targets for the model's architecture; raises ``ConfigError`` if there are none."""
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    defaults = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if architecture not in defaults:
        raise ConfigError(
            f"peft has no default LoRA targets for the architecture {architecture!r}; choose targets from its linear "
            f"layers: {_linear_layer_names(model)}"
        )
    return list(defaults[architecture])


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raises ``ConfigError`` if a target matches no module, or one that is not a linear layer."""
    for target in targets:
        matches = [(name, m) for name, m in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not matches:
            raise ConfigError(
                f"no module of {type(model).__name__} is named {target!r} (LoRA targets {', '.join(targets)}); "
                f"its linear layers: {_linear_layer_names(model)}"
            )
        for name, module in matches:
            if not isinstance(module, nn.Linear | Conv1D):
                raise ConfigError(
                    f"LoRA targets must be linear layers, but {name!r} is of type {type(module).__name__}"
                )


def _linear_layer_names(model: nn.Module) -> str:
    """Lists the last parts of the names of linear layers, at most 12."""
    names = [name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    return ", ".join(list(dict.fromkeys(names))[:12]) or "none"


@torch.no_grad()
def _initialize(model: nn.Module, seed: int) -> None:
    """Draws every A from the stream and sets every B to zero.

    The elements of all A are numbered consecutively in the order of the layers; an element's number is its id in the
    stream.
    """
    first = 0
    for _, layer in _adapted_layers(model):
        weight: Tensor = layer.get_base_layer().weight
        for adapter in (layer.lora_A[_NAME], layer.lora_B[_NAME]):
            adapter.to(device=weight.device, dtype=weight.dtype)
        a: Tensor = layer.lora_A[_NAME].weight
        z = stream.normal(seed, torch.arange(first, first + a.numel(), dtype=torch.int64, device="cpu")).view(a.shape)
        a.copy_(z / math.sqrt(3 * a.shape[1]))
        layer.lora_B[_NAME].weight.zero_()
        first += a.numel()


__all__ = ["add_lora", "merge_lora"]
