"""Loads the model of a run."""

import dataclasses
from typing import Any

import torch

from ...engine.lm import embedded
from ...engine.lm.lora import add_lora
from ...engine.lm.models import DTYPES, LanguageModel, check_device, load_model
from ...engine.lm.own_dtype import own_dtype
from ..config.run_config import RunConfig
from ..config.sections import AUTO, MaskedWeightsMode
from ..methods import Elements


def load_base_model(
    model: str,
    dtype: str,
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
    **kept: Any,
) -> LanguageModel:
    """Loads a base model.

    Args:
        model: a value of ``--model``, which may also name the embedded model.
        dtype: name of the dtype.
        device: the device.
        trust_remote_code: see ``models.load_model``.
        kept: how the weights are kept: ``quantize``, ``offload``, ``adds`` and ``rounds`` of ``models.load_model``.
    """
    if model == embedded.NAME:
        return embedded.load(DTYPES[dtype], device, **kept)
    return load_model(model, DTYPES[dtype], device, trust_remote_code=trust_remote_code, **kept)


def resolved(config: RunConfig) -> RunConfig:
    """Returns the settings with the device and dtype that "auto" stands for on this machine.

    All of a run have the same dtype, and the bits depend on it, so it is chosen once, where the run starts.
    """
    base = config.model
    device = base.device
    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = base.dtype
    if dtype == AUTO:
        source = str(embedded.DIRECTORY) if base.source == embedded.NAME else base.source
        dtype = own_dtype(source) if check_device(device).type == "cuda" else "float32"
    return config.replace(device=device, dtype=dtype)


def slow_dtype(config: RunConfig) -> str | None:
    """Returns a line for the log if the run's dtype is slow on its device, else None.

    Args:
        config: the settings, resolved.
    """
    has_tf32 = torch.get_float32_matmul_precision() != "highest"
    if config.model.device == "cpu" or config.model.dtype != "float32" or has_tf32:
        return None
    return (
        "float32 is slow on a GPU without TF32: give --dtype bfloat16 if its precision is enough (see "
        "SparseZO.unchanged_fraction)"
    )


def load_language_model(
    config: RunConfig, *, model: str | None = None, trust_remote_code: bool = False
) -> LanguageModel:
    """Loads the run's model and its tokenizer, and adds adapters if the method trains them.

    All parameters are frozen: steps need no autograd, and torch's forward has other last bits for parameters that
    require gradients, also in inference mode.

    Args:
        config: the settings; "auto" is resolved, see ``resolved``.
        model: where the base model is now; None: where the settings say.
        trust_remote_code: see ``models.load_model``; not a setting, so that no settings file can switch it on.
    """
    base = resolved(config).model
    lm = load_base_model(
        model or base.source, base.dtype, base.device, trust_remote_code=trust_remote_code,
        quantize=base.quantize, offload=base.offload, adds=base.masked_weights is MaskedWeightsMode.ADD,
        rounds=base.masked_weights is MaskedWeightsMode.ROUND,
    )  # fmt: skip
    if config.method.recipe.elements is Elements.LORA:
        lora = config.lora
        added = add_lora(lm.model, rank=lora.rank, alpha=lora.alpha, targets=lora.modules, seed=config.seed)
        lm = dataclasses.replace(lm, adapters=tuple(added))
    lm.model.requires_grad_(False)
    return lm


__all__ = ["load_base_model", "load_language_model", "resolved", "slow_dtype"]
