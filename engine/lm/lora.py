"""Low-rank adapters in place: put into a model for training, and merged into its weights afterwards.

    y = W x + (alpha / rank) * B A x,    A [rank, in] at random, B [out, rank] zero: at first nothing changes

The model stays the model it is: same class, same head. ``SparseMask.of_parameters`` over what ``add_lora`` returns is
zeroth-order fine-tuning of the adapters.

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
from ..parameters import floating_parameters

_NAME = "default"


def add_lora(
    model: nn.Module, *, rank: int = 8, alpha: float = 16, targets: Sequence[str] = (), seed: int
) -> list[str]:
    """Puts adapters beside some linear layers of a model; its outputs stay as they are.

    B is zero. A is normal with standard deviation ``1 / sqrt(3 in)``, that of peft's uniform default, drawn from the
    project's stream: equal seeds give equal bits. The adapters have the dtype and device of the layers they are beside.
    No parameter of the model requires a gradient afterwards.

    Args:
        model: a transformers model; its layers are replaced by layers with adapters.
        rank: of the adapters, at least 1.
        alpha: the adapters' outputs are scaled by ``alpha / rank``; positive.
        targets: names of the layers, or their last parts ("q_proj"); empty for peft's own choice for the architecture.
        seed: in [0, 2**64).

    Returns:
        Names of the adapters' parameters, as in ``model.named_parameters()``.

    Raises:
        ConfigError: if peft is missing, the rank or alpha is out of range, the model has adapters already, no layer
            has such a name, a layer is not linear, or peft has no choice for the architecture.
    """
    peft = _peft()
    if rank < 1 or not 0 < alpha < math.inf:
        raise ConfigError(f"LoRA needs a rank of at least 1 and a positive alpha, got rank {rank} and alpha {alpha}")
    if next(_layers(model), None) is not None:
        raise ConfigError("the model has adapters already; merge_lora puts them into its weights")
    stream.check_seed(seed)
    targets = list(targets) or _default_targets(model, peft)
    _check_targets(model, targets)
    training = model.training
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # peft draws adapters, which are drawn anew here
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # it finds out by itself, and says so
        peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
    _draw(model, stream.derived_seed(seed, "lora"))
    model.requires_grad_(False).train(training)
    inside = [f"{name}." for name, _ in _layers(model)]
    return [
        name
        for name, _ in floating_parameters(model)
        if any(name.startswith(layer) and not name.startswith(f"{layer}base_layer.") for layer in inside)
    ]


def merge_lora(model: nn.Module) -> None:
    """Adds the adapters to the weights they are beside and takes them out: the model is a plain one again.

    Args:
        model: with adapters of ``add_lora``; its weights are written.

    Raises:
        ConfigError: if it has none, or peft is missing.
    """
    layers = list(_layers(model))
    if not layers:
        raise ConfigError("the model has no adapters to merge; add_lora puts them in")
    with torch.no_grad():
        for name, layer in layers:
            layer.merge(adapter_names=[_NAME])
            model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"LoRA needs the package peft ({error}); {install_hint('lora')}") from error
    return peft


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer with an adapter."""
    kind = _peft().tuners.lora.LoraLayer
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


def _default_targets(model: nn.Module, peft: Any) -> list[str]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if kind not in known:
        raise ConfigError(
            f"peft has no default LoRA targets for the architecture {kind!r}; name some: {_some_linear(model)}"
        )
    return list(known[kind])


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    for target in targets:
        found = [(name, m) for name, m in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not found:
            raise ConfigError(
                f"no module of {type(model).__name__} is named {target!r} (LoRA targets {', '.join(targets)}); "
                f"its linear layers: {_some_linear(model)}"
            )
        for name, module in found:
            if not isinstance(module, nn.Linear | Conv1D):
                raise ConfigError(f"LoRA needs linear layers; {name!r} is a {type(module).__name__}")


def _some_linear(model: nn.Module) -> str:
    """Last parts of the names of linear layers, a few of them."""
    names = [name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    return ", ".join(list(dict.fromkeys(names))[:12]) or "none"


@torch.no_grad()
def _draw(model: nn.Module, seed: int) -> None:
    """Sets every A from the stream, its elements numbered through in the order of the layers, and every B to zero."""
    first = 0
    for _, layer in _layers(model):
        like: Tensor = layer.get_base_layer().weight
        for adapter in (layer.lora_A[_NAME], layer.lora_B[_NAME]):
            adapter.to(device=like.device, dtype=like.dtype)
        a: Tensor = layer.lora_A[_NAME].weight
        z = stream.normal(seed, torch.arange(first, first + a.numel())).view(a.shape)
        a.copy_(z / math.sqrt(3 * a.shape[1]))
        layer.lora_B[_NAME].weight.zero_()
        first += a.numel()


__all__ = ["add_lora", "merge_lora"]
