"""What counts as a causal language model: the models that the loss on text and the list of blocks are made for."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import ModelError

# Tokens of the two texts that ``check_causal`` compares.
_PROBE_LENGTH = 4
_TOLERANCE = 1e-3


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers causal LM that a model is, without wrappers around it (``torch.compile``, peft).

    A causal LM is of the class that transformers has for causal LMs of its configuration, a subclass included; or, for
    code that comes with a model, of the class that the configuration names for ``AutoModelForCausalLM``, or of any
    other class that is no encoder-decoder, can generate text and has an output head.

    Raises:
        ModelError: if the model is anything else, such as a masked LM, a classifier or an encoder-decoder, or is
            prefixed with trained prompts by peft.
    """
    inner = cast(Any, getattr(model, "_orig_mod", model))
    if hasattr(inner, "get_base_model"):  # peft
        if getattr(inner.active_peft_config, "is_prompt_learning", False):
            raise ModelError(
                f"{type(model).__name__} puts trained prompts before the text, which the loss on text would leave out; "
                f"pass `loss`, a function of model and batch"
            )
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel) or not _is_causal_lm(inner):
        raise ModelError(
            f"{type(model).__name__} is no causal language model of transformers, so the loss of predicting the next "
            f"token does not fit it; pass `loss`, a function of model and batch"
        )
    return inner


def _is_causal_lm(model: PreTrainedModel) -> bool:
    registered = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
    if isinstance(model, registered):
        return True
    if type(model).__module__.startswith("transformers.models."):
        return False
    named = (getattr(model.config, "auto_map", None) or {}).get("AutoModelForCausalLM", "")
    if named.rpartition(".")[2] == type(model).__name__:
        return True
    return model.can_generate() and not model.config.is_encoder_decoder and model.get_output_embeddings() is not None


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Checks that a model is a causal LM whose positions do not depend on later tokens: two forwards of four tokens.

    Some classes for causal LMs read the whole text unless they are configured not to, among them BERT's and XLNet's.

    Args:
        model: the model, in evaluation mode.

    Raises:
        ModelError: if it is no causal LM (see ``causal_lm``), or a hidden state depends on a later token.
    """
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    first, second = (_hidden_states(lm, last, device) for last in (0, 1))
    before, at = (first - second).abs().amax(-1).split([_PROBE_LENGTH - 1, 1])
    if before.max() > max(_TOLERANCE, 4 * torch.finfo(first.dtype).eps) * at:
        raise ModelError(
            f"{type(lm).__name__} reads the tokens after a position too, so the loss of predicting the next token does "
            f"not fit it; configure it as a decoder (`is_decoder=True`), or pass `loss`, a function of model and batch"
        )


def _hidden_states(lm: PreTrainedModel, last_token: int, device: torch.device) -> Tensor:
    """Last hidden states of a text that ends in a token: [4, width]."""
    ids = torch.full((1, _PROBE_LENGTH), 1, dtype=torch.int64, device=device)
    ids[0, -1] = last_token
    decoder = cast(Any, lm).get_decoder()
    output = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return cast(Tensor, output.last_hidden_state[0])


def position_ids(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Position ids that count the real tokens, as a keyword argument; none for a model that takes no position ids.

    With them a text's outputs do not depend on the padding before it. A model that is given none counts positions from
    the first padding token, if it has absolute positions.

    Args:
        model: a causal LM or its decoder.
        attention_mask: int64 [B, L], 1 at tokens and 0 at padding.
    """
    takes = _takes_position_ids(type(model).forward)
    return {"position_ids": (attention_mask.cumsum(-1) - 1).clamp_(min=0)} if takes else {}


@functools.cache
def _takes_position_ids(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters
    return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


__all__ = ["causal_lm", "check_causal", "position_ids"]
