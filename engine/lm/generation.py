"""``generate``: continues prompts with a model's own ``generate``, by the most likely token or by sampling."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from .. import stream
from ..errors import ConfigError, DataError, ModelError
from .batches import pad_rows
from .causal import causal_lm
from .models import max_positions

# Prompts per batch by type of device: a GPU needs large batches to be busy.
_BATCH_SIZES = {"cuda": 64}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draws tokens instead of taking the most likely one. Equal seeds give equal texts, whatever else is in a batch.

    Args:
        temperature: the logits are divided by it; above 0.
        top_p: tokens are drawn from the fewest that together have this probability; in (0, 1].
        seed: seed of the draws, in [0, 2**64).

    Raises:
        ConfigError: if a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature must be finite and above 0, got {self.temperature:g}; leave it out for 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p:g}")


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    end: Sequence[int],
    max_new_tokens: int,
    batch_size: int | None = None,
    sampling: Sampling | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continues each prompt until an end token. A prompt's continuation does not depend on the others.

    The checkpoint's own settings for generation are left aside: no sampling, penalties or limits but those given here.

    Args:
        model: a transformers causal LM. It computes in evaluation mode, and is in the mode that it had afterwards.
        prompts: token ids of each prompt, at least one each.
        pad: id of the padding token.
        end: ids of the tokens at which a continuation ends; may be empty.
        max_new_tokens: maximum number of tokens of a continuation, at least 1. It has fewer where prompt and
            continuation fill the model's positions.
        batch_size: number of prompts per batch; None: 32 on a CPU, 64 on a GPU.
        sampling: how tokens are drawn; None takes the most likely one.
        on_token: called with each token of the continuation of a single prompt as soon as it is known.

    Returns:
        Token ids of each continuation, in the order of the prompts, without the end token.

    Raises:
        DataError: if a prompt has no tokens, or fills the model's positions.
        ModelError: if the model is no causal LM.
        ValueError: if ``on_token`` is given for another number of prompts than one.
    """
    if on_token is not None and len(prompts) != 1:
        raise ValueError(f"on_token is for a single prompt, got {len(prompts)}")
    try:
        lm = causal_lm(model)
    except ModelError as error:
        name = type(model).__name__
        raise ModelError(f"{name} cannot generate text: it is no causal language model of transformers") from error
    device = next(lm.parameters()).device
    limits = _limits(prompts, max_new_tokens, max_positions(lm))
    streamer = None if on_token is None else _Streamer(on_token, end)
    results: dict[int, list[int]] = {}
    with _ready_to_generate(lm):
        for part in _batches(prompts, limits, batch_size or _BATCH_SIZES.get(device.type, 32)):
            ids, mask = (torch.from_numpy(a).to(device) for a in pad_rows([np.array(prompts[i]) for i in part], pad))
            output = lm.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    max_new_tokens=limits[part[0]], do_sample=False, eos_token_id=list(end) or None, pad_token_id=pad
                ),
                logits_processor=_processors(sampling, part, ids.shape[1]),
                streamer=streamer,
            )
            for i, row in zip(part, output[:, ids.shape[1] :].tolist(), strict=True):
                results[i] = list(itertools.takewhile(lambda token: token not in end, row))
    return [results[i] for i in range(len(prompts))]


def _limits(prompts: Sequence[Sequence[int]], max_new_tokens: int, positions: int | None) -> list[int]:
    """Maximum number of new tokens of each prompt; see ``generate``."""
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise DataError(f"prompt {number} has no tokens, so nothing can continue it; leave it out")
        if positions is not None and len(prompt) >= positions:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens, and the model has {positions} positions, so there is no "
                f"room for an answer; shorten the prompt"
            )
    return [min(max_new_tokens, (positions or len(p) + max_new_tokens) - len(p)) for p in prompts]


def _batches(prompts: Sequence[Sequence[int]], limits: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yields the numbers of prompts in batches of like length. All prompts of a batch have the same limit."""
    order = sorted(range(len(prompts)), key=lambda i: (-limits[i], len(prompts[i])))
    for _, group in itertools.groupby(order, key=lambda i: limits[i]):
        numbers = list(group)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


@contextmanager
def _ready_to_generate(lm: PreTrainedModel) -> Iterator[None]:
    """Context in which a model is in evaluation mode and has no settings of its own for generation."""
    modes = {module: module.training for module in lm.modules()}
    own = lm.generation_config
    lm.generation_config = GenerationConfig()
    lm.eval()
    try:
        yield
    finally:
        lm.generation_config = own
        for module, mode in modes.items():
            module.training = mode


def _processors(sampling: Sampling | None, prompts: list[int], width: int) -> LogitsProcessorList:
    """What is done to the logits before the highest is taken."""
    if sampling is None:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*processors, _Noise(sampling.seed, prompts, width)])


class _Noise(LogitsProcessor):
    """Adds Gumbel noise, after which the highest logit is a draw from the softmax of the logits.

    transformers itself draws from torch's global generator.
    """

    def __init__(self, seed: int, prompts: list[int], width: int) -> None:
        self._seed, self._prompts, self._width = seed, prompts, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the logits, [B, V], with noise; ``input_ids`` is [B, L]."""
        step, size = input_ids.shape[1] - self._width, scores.shape[1]
        blocks = torch.arange(-(-size // 4), dtype=torch.int64, device=scores.device)
        words = torch.stack(
            [
                stream.bits(stream.derived_seed(self._seed, "samp", prompt, step), blocks).flatten()[:size]
                for prompt in self._prompts
            ]
        )
        uniform = (words.double() + 0.5) / 2**32
        return scores - (-uniform.log()).log().to(scores.dtype)


class _Streamer(BaseStreamer):
    """Passes on the tokens of one continuation, up to its end token. ``generate`` puts the prompt first."""

    def __init__(self, on_token: Callable[[int], None], end: Sequence[int]) -> None:
        self._on_token, self._end, self._prompt_was_put = on_token, end, False

    def put(self, value: Tensor) -> None:
        """Receives the prompt, then one token after the other: int64 [1]."""
        if self._prompt_was_put and int(value) not in self._end:
            self._on_token(int(value))
        self._prompt_was_put = True

    def end(self) -> None:
        """Receives that there are no more tokens."""


__all__ = ["Sampling", "generate"]
