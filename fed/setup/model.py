"""Loads the model of a run."""

import dataclasses

from ...engine.lm import embedded
from ...engine.lm.lora import add_lora
from ...engine.lm.models import DTYPES, LanguageModel, load_model
from ..config.run_config import RunConfig
from ..methods import Elements


def load_base_model(model: str, dtype: str, device: str = "cpu", *, trust_remote_code: bool = False) -> LanguageModel:
    """Loads a base model. ``model`` is a value of ``--model``, which may also name the embedded model."""
    if model == embedded.NAME:
        return embedded.load(DTYPES[dtype], device)
    return load_model(model, DTYPES[dtype], device, trust_remote_code=trust_remote_code)


def load_language_model(
    config: RunConfig, *, model: str | None = None, trust_remote_code: bool = False
) -> LanguageModel:
    """Loads the run's model and its tokenizer, and adds adapters if the method trains them.

    All parameters are frozen: steps need no autograd, and torch's forward has other last bits for parameters that
    require gradients, also in inference mode.

    Args:
        config: the settings.
        model: where the base model is now; None: where the settings say.
        trust_remote_code: see ``models.load_model``; not a setting, so that no settings file can switch it on.
    """
    base = config.model
    lm = load_base_model(model or base.source, base.dtype, base.device, trust_remote_code=trust_remote_code)
    if config.method.recipe.elements is Elements.LORA:
        lora = config.lora
        added = add_lora(lm.model, rank=lora.rank, alpha=lora.alpha, targets=lora.modules, seed=config.seed)
        lm = dataclasses.replace(lm, adapters=tuple(added))
    lm.model.requires_grad_(False)
    return lm


__all__ = ["load_base_model", "load_language_model"]
