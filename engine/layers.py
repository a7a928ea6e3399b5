"""The transformer blocks of a causal language model: their names, and the block with the largest gradient."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import MaskError, ModelError
from .gradients import LossFunction, Receiver, stream_batch_gradients
from .lm.causal import causal_lm
from .parameters import floating_parameters


def decoder_layers(model: nn.Module) -> list[str]:
    """Lists the dotted names of the transformer blocks, in order, as in ``model.named_modules()``.

    The blocks are the members of the decoder's largest ``ModuleList``, not counting lists nested in another list.

    Args:
        model: a transformers causal LM.

    Raises:
        ModelError: if the model is no transformers causal LM, or its decoder has no list of blocks.
    """
    decoder = cast(Any, causal_lm(model)).get_decoder()
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is decoder), "")
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise ModelError(f"the decoder {type(decoder).__name__} of {type(model).__name__} has no ModuleList of blocks")
    name = max(outer, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return [f"{prefix}{name}.{i}" for i in range(len(lists[name]))]


def parameter_names(model: nn.Module, module: str) -> list[str]:
    """Lists the names of a module's floating-point parameters.

    Args:
        model: the model.
        module: dotted name of the module in the model.
    """
    return [name for name, _ in floating_parameters(model) if name.startswith(f"{module}.")]


@torch.inference_mode(False)
def dominant_layer(model: nn.Module, batches: Iterable[Any], loss: LossFunction | None = None) -> str:
    """Finds the block with the largest total squared gradient on calibration text; the first one in case of a tie.

    The squared gradients are summed over the block's elements and over the batches. Memory besides the model and the
    activations: one parameter's gradient at a time, and one number per block.

    Args:
        model: a transformers causal LM; unchanged afterwards.
        batches: calibration batches, see ``SparseMask.from_gradients``.
        loss: loss function, see ``SparseMask.from_gradients``.

    Returns:
        Dotted name of the block.

    Raises:
        ModelError: see ``decoder_layers``.
        MaskError: if there is no batch, or a loss or a gradient is not finite.
    """
    layers = decoder_layers(model)
    totals = {layer: torch.zeros((), dtype=torch.float64, device="cpu") for layer in layers}

    def adder(total: Tensor) -> Receiver:
        return lambda gradient: _add_squared_norm(total, gradient)

    receivers = {name: adder(totals[layer]) for layer in layers for name in parameter_names(model, layer)}
    stream_batch_gradients(model, batches, loss, receivers)
    for layer, total in totals.items():
        if not torch.isfinite(total):
            raise MaskError(f"the gradient of block {layer!r} is not finite; calibrate in float32")
    return max(layers, key=lambda layer: totals[layer].item())


def _add_squared_norm(total: Tensor, gradient: Tensor) -> None:
    total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square().cpu()


__all__ = ["decoder_layers", "dominant_layer", "parameter_names"]
