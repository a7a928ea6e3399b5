"""Trains the embedded model: ``python -m meerkat_engine.engine.lm.embedded.pretrain DIR``.

Pre-trains a small Llama-architecture model from random weights on synthetic reviews and saves it with its tokenizer.
The weights in the package were trained with the defaults below. On another machine or with another thread count, their
last bits differ.
"""

from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ... import stream
from ..data import token_batches
from ..text_loss import language_model_loss
from . import corpus


def make_tokenizer() -> Any:
    """Builds the tokenizer: one token per word; sequences begin with <s>, and answers end with a full stop."""
    words = ["<pad>", "<s>", "<unk>", *corpus.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>", "eos_token": "."}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(vocabulary: int, end: int, seed: int) -> LlamaForCausalLM:
    """Builds the model: two layers of width 64, tied embeddings, weights drawn from the project's stream.

    Args:
        vocabulary: number of tokens.
        end: id of the token that ends an answer.
        seed: seed of the weights, in [0, 2**64).
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=end,
    )
    model = LlamaForCausalLM(config)
    base = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                ids = torch.arange(base, base + parameter.numel(), dtype=torch.int64, device="cpu")
                parameter.copy_(stream.normal(seed, ids).view_as(parameter) * parameter.shape[1] ** -0.5)
            base += parameter.numel()
    return model


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=2500, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--lr", default=3e-3, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(directory: Path, steps: int, batch_size: int, lr: float, seed: int) -> None:
    """Pre-trains the embedded model and saves it to DIRECTORY."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), tokenizer.eos_token_id, stream.derived_seed(seed, "init"))
    batches = token_batches(corpus.texts(steps * batch_size, seed), tokenizer, batch_size, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, step / 100) * (1 - step / steps))
    progress = trange(steps, disable=None)
    for _, batch in zip(progress, batches, strict=True):
        loss = language_model_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    click.echo(f"loss {loss.item():.4f} after {steps} steps; saved to {directory}")


if __name__ == "__main__":
    main()
