"""Token sequences in rows, and the forward passes over them: one padded sequence a row, or several sequences a row."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..errors import ModelError
from .causal import position_ids

_FULL, _SLIDING = "full_attention", "sliding_attention"
# Last hidden states of a decoder, and the class of its output, which the model's head expects.
HiddenStates = tuple[Tensor, type[ModelOutput]]


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """One sequence a row, padded on the left.

    Args:
        input_ids: int64 [N, L].
        attention_mask: int64 [N, L], 0 on padding.
        keep: number of last positions of each row whose logits are needed.
    """

    input_ids: Tensor
    attention_mask: Tensor
    keep: int

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """The keyword arguments of the model's forward pass."""
        mask = self.attention_mask
        return {"input_ids": self.input_ids, "attention_mask": mask, "use_cache": False, **position_ids(model, mask)}

    def logits(self, model: nn.Module) -> Tensor:
        """Computes the logits of the last ``keep`` positions of each row: [N * keep, V].

        Raises:
            ModelError: if the model returns another number of positions.
        """
        logits = cast(Tensor, model(**self.arguments(model), logits_to_keep=self.keep).logits)
        if logits.shape[1] != self.keep:
            raise ModelError(
                f"{type(model).__name__} ignores logits_to_keep: it returned logits of {logits.shape[1]} positions, "
                f"{self.keep} were requested"
            )
        return logits.flatten(0, 1)

    def hidden_states(self, model: nn.Module) -> HiddenStates:
        """Computes the hidden states of all positions, row by row: [N * L, width]; and the class of the output."""
        return _flat_hidden_states(model, self.arguments(model))


@dataclass(frozen=True, kw_only=True)
class SortedRows:
    """One sequence a row, in several forward passes over sequences of like length.

    Args:
        parts: the rows of each forward pass.
        order: int64 [P], place of each position's logits among those of all parts one after the other; None if only
            hidden states are needed.
    """

    parts: tuple[PaddedRows, ...]
    order: Tensor | None = None

    def logits(self, model: nn.Module) -> Tensor:
        """Computes the logits of the last positions of each row, in the order of the rows before they were sorted."""
        assert self.order is not None
        return torch.cat([part.logits(model) for part in self.parts]).index_select(0, self.order)

    def hidden_states(self, model: nn.Module) -> HiddenStates:
        """Computes the hidden states of all parts, one after the other; see ``PaddedRows``."""
        parts = [part.hidden_states(model) for part in self.parts]
        return torch.cat([hidden for hidden, _ in parts]), parts[0][1]


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Several sequences a row, each of which attends to itself alone.

    A sequence may branch: several continuations, one after the other, of a prompt that is there once. A token is
    attended to by itself and by the later tokens of its row up to, and without, the position in ``attended_until``: for
    a token of a prompt the end of its last continuation, for one of a continuation the end of that continuation.

    Args:
        input_ids: int64 [R, W].
        position_ids: int64 [R, W]. The positions of every sequence begin at 0, and those of every continuation after
            the prompt's.
        attended_until: int64 [R, W], in [1, W].
        scored: int64 [P], places in the flattened rows whose logits are needed.
    """

    input_ids: Tensor
    position_ids: Tensor
    attended_until: Tensor
    scored: Tensor

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """The keyword arguments of the model's forward pass.

        Raises:
            ModelError: if the model has layers with another kind of attention than full and sliding.
        """
        return {
            "input_ids": self.input_ids,
            "attention_mask": self._attention_mask(model),
            "position_ids": self.position_ids,
            "use_cache": False,
        }

    def _attention_mask(self, model: nn.Module) -> Tensor | dict[str, Tensor]:
        """The model's attention mask, [R, 1, W, W]; one for each kind of layer if there are two.

        A mask with four dimensions is taken by transformers as it is, without looking into it, so that a host does not
        wait for its GPU.
        """
        config = cast(Any, model).config.get_text_config()
        kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
        if kinds - {_FULL, _SLIDING}:
            raise ModelError(f"{type(model).__name__} has layers of {', '.join(sorted(kinds - {_FULL, _SLIDING}))}")
        places = torch.arange(self.input_ids.shape[1], dtype=torch.int64, device=self.input_ids.device)
        visible = (places <= places[:, None]) & (places[:, None] < self.attended_until[:, None])
        if window is None or kinds == {_FULL}:
            return _mask(model, visible)
        near = self.position_ids[:, :, None] - self.position_ids[:, None] < window
        sliding = _mask(model, visible & near)
        return {_FULL: _mask(model, visible), _SLIDING: sliding} if _FULL in kinds else sliding

    def logits(self, model: nn.Module) -> Tensor:
        """Computes the logits of the scored positions: [P, V].

        Raises:
            ModelError: if the model cannot take such rows, or its output head is not the module that it names.
        """
        with _hidden_states_selected(model, self.scored):
            logits = cast(Tensor, model(**self.arguments(model)).logits)
        if logits.shape[:2] != (1, len(self.scored)):
            raise ModelError(
                f"{type(model).__name__} returned logits of shape {list(logits.shape)}: it does not pass its hidden "
                f"states through the output head that get_output_embeddings() names"
            )
        return logits[0]

    def hidden_states(self, model: nn.Module) -> HiddenStates:
        """Computes the hidden states of all positions, row by row: [R * W, width]; see ``PaddedRows``."""
        return _flat_hidden_states(model, self.arguments(model))


def _flat_hidden_states(model: nn.Module, arguments: dict[str, Any]) -> HiddenStates:
    output = cast(Any, model).get_decoder()(**arguments)
    return output.last_hidden_state.flatten(0, 1), type(output)


def _mask(model: nn.Module, visible: Tensor) -> Tensor:
    """Makes a mask [R, 1, W, W] of a bool tensor [R, W, W]; attention other than torch's adds it to the scores."""
    if cast(Any, model).config._attn_implementation == "sdpa":
        return visible.unsqueeze(1)
    dtype = cast(Any, model).get_input_embeddings().weight.dtype
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=visible.device)
    return torch.where(visible, torch.zeros_like(hidden), hidden).unsqueeze(1)


@contextmanager
def _hidden_states_selected(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Context in which the model's output head computes the logits of some places of the flattened rows only."""

    def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        return hidden.flatten(0, -2).index_select(0, places).unsqueeze(0), *arguments[1:]

    head = cast(Any, model).get_output_embeddings()
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


Rows = PaddedRows | SortedRows | PackedRows

__all__ = ["HiddenStates", "PackedRows", "PaddedRows", "Rows", "SortedRows"]
