"""Measures the memory of a step beside frozen weights. A program:

    python -m helpers.frozen_memory DIRECTORY KIND ...

For each KIND it loads a checkpoint with its weights kept so, makes a random mask and takes a step. Anonymous memory is
what counts: pages of a mapped file belong to the page cache. The last line of the output is a report in JSON.

Peaks are exact for steps: the process' peak of resident memory (VmHWM, which can be set back) minus the pages of files,
all of which have been read before. While a model is loaded these come one after the other, so a thread looks at the
anonymous pages a thousand times a second.
"""

import gc
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine.frozen.weight import FrozenWeight, frozen_weights
from meerkat_engine.engine.lm.models import load_model
from meerkat_engine.engine.lm.quantize import Quantize
from meerkat_engine.engine.lm.text_loss import language_model_loss

DENSITY = 1e-3
TOKENS = 32


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


class Peak:
    """The peak of anonymous memory within ``measured``, above what there was before, in bytes."""

    bytes = 0


@contextmanager
def measured() -> Iterator[Peak]:
    """Context whose peak of anonymous memory is known afterwards, exactly: no page of a file may be new to it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    peak, before, files = Peak(), status("RssAnon"), status("RssFile")
    yield peak
    high = status("VmHWM")
    gained = status("RssFile") - files
    assert gained < 1 << 20, f"{gained} bytes of files were read in between"
    peak.bytes = high - files - before


@contextmanager
def watched() -> Iterator[Peak]:
    """Like ``measured``, but a thread looks at the anonymous memory every millisecond."""
    gc.collect()
    peak, before, ended = Peak(), status("RssAnon"), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            peak.bytes = max(peak.bytes, status("RssAnon") - before)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def step(model: nn.Module, mask: SparseMask) -> SparseZO:
    opt = SparseZO(model, mask, lr=1e-3, frozen=True, backend="torch")
    opt.step(lambda: loss_of(model))
    return opt


def loss_of(model: nn.Module) -> Tensor:
    return language_model_loss(model, torch.arange(TOKENS).view(1, TOKENS))


def activations(directory: str) -> int:
    """Peak of the activations of a forward pass, from a plain model with one layer: they are one layer's at a time."""
    config = AutoConfig.from_pretrained(directory)
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    peaks = []
    for _ in range(2):  # the first pass reads code from the libraries' files
        gc.collect()
        with torch.inference_mode(), watched() if not peaks else measured() as peak:
            loss_of(model)
        peaks.append(peak.bytes)
    return peaks[-1]


def measure(directory: str, kind: Quantize) -> dict[str, int]:
    """Loads the model and takes two steps. Returns sizes in bytes."""
    tiny = load_model(f"{directory}/tiny", quantize=kind).model  # imports what is needed
    step(tiny, SparseMask.random(tiny, 0.1, 1, frozen=True))
    with watched() as loading:
        model = load_model(directory, quantize=kind).model
    weights = frozen_weights(model)
    for weight in weights.values():
        weight.dense()  # reads its pages of the file
    with measured() as stepping:
        mask = SparseMask.random(model, DENSITY, 1, frozen=True)
        step(model, mask)
    return {
        "masked elements": len(mask),
        "loading": loading.bytes,
        "stepping": stepping.bytes,
        "stored": sum(w.stored.nbytes for w in weights.values() if not is_mapped(w)),
        "mapped": sum(w.stored.nbytes for w in weights.values() if is_mapped(w)),
        "largest": max(4 * w.numel() for w in weights.values()),
    }


def is_mapped(weight: FrozenWeight) -> bool:
    """Whether a weight has the format of the checkpoint."""
    return weight.stored.format == "bfloat16"


def main(directory: str, *kinds: str) -> None:
    """Runs the program; see the module."""
    torch.set_num_threads(1)
    report = {"activations": activations(directory)}
    print(json.dumps(report | {kind: measure(directory, Quantize(kind)) for kind in kinds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
