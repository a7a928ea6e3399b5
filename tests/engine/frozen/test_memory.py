"""The memory that a model with frozen weights takes while it is loaded and trained."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.models import make_byte_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 1 << 20
SLACK = 2 * MIB  # the kernel's counters lag behind by some pages for each thread, and Python has objects of its own
OBJECTS = 5 * MIB  # of Python: modules, config, tokenizer


def save_llama(path: Path, *, layers: int, hidden: int, intermediate: int) -> int:
    """Saves a Llama with random weights in bfloat16. Returns the number of its parameters."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(float(len(shape) == 1), 0.02, generator=generator)
        for name, shape in shapes.items()
    }
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    make_byte_tokenizer().save_pretrained(path)
    return sum(tensor.numel() for tensor in tensors.values())


def test_a_step_takes_the_weights_as_stored_24_bytes_a_masked_element_and_one_dense_weight(tmp_path: Path) -> None:
    """Beside the activations. Weights as stored, in the file's pages, take no memory of their own."""
    for package in ("bitsandbytes", "torchao"):
        pytest.importorskip(package, reason="needs the extra quantize")
    parameters = save_llama(tmp_path / "model", layers=8, hidden=1024, intermediate=2816)
    assert parameters > 100_000_000
    save_llama(tmp_path / "model" / "tiny", layers=1, hidden=128, intermediate=256)
    process = subprocess.run(
        [sys.executable, "-m", "helpers.frozen_memory", str(tmp_path / "model"), "as-stored", "int8", "nf4"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
        # glibc gives each freed tensor back to the kernel at once, so that what is free does not count
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    report: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    activations = report.pop("activations")
    print(report, activations)
    assert activations < 8 * MIB
    bytes_of = {"as-stored": 0, "int8": 1.01, "nf4": 0.5625 * 1.01}
    for kind, sizes in report.items():
        assert sizes["largest"] == 4 * 1024 * 2816
        assert sizes["stored"] <= bytes_of[kind] * parameters
        assert (sizes["mapped"] == 2 * parameters) == (kind == "as-stored")
        beside = 24 * sizes["masked elements"]
        allowed = sizes["stored"] + beside + activations + sizes["largest"]
        assert sizes["stored"] + sizes["stepping"] <= 1.02 * allowed + SLACK, kind
        assert sizes["stepping"] > sizes["largest"], kind  # it measures something
        # quantizing a matrix takes a few copies of it in float32
        copies = {"as-stored": 1, "int8": 3, "nf4": 4}[kind]
        assert sizes["loading"] <= 1.02 * (sizes["stored"] + activations + copies * sizes["largest"]) + OBJECTS, kind
