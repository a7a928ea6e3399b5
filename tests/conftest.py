"""Shared fixtures. The kernels run in Triton's interpreter, which has to be switched on before they are imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # 0 on a GPU: see the tests marked so
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

# Tiny models gain nothing from a second thread, and lose much where two processes share two cores.
torch.set_num_threads(1)

# How many times as long the fuzz tests take: `make fuzz`.
FUZZ = int(os.environ.get("MEERKAT_FUZZ", "1"))

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ARCHITECTURES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, {"head_dim": 8}),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, {}),  # absolute positions, left to the caller
    "opt": (transformers.OPTForCausalLM, transformers.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def make_model(
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocabulary: int = 96,
    positions: int = 64,
) -> nn.Module:
    """A tiny random causal language model."""
    kind, config, extra = _ARCHITECTURES[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config(**(_COMMON | extra | {"vocab_size": vocabulary, "max_position_embeddings": positions})))
    # biases and norms start at constants; random ones make every parameter count
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.data += 0.01 * torch.arange(p.numel()).remainder(7) * (1 if "bias" in name else 0.1)
    return model.to(dtype).eval().requires_grad_(False)


def make_tokenizer(words: str) -> transformers.PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(words.split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def make_byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of every bit: NaN equals itself, -0 differs from +0."""
    as_ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(as_ints[a.element_size()]), b.contiguous().view(as_ints[b.element_size()])
    )  # fmt: skip


# Property of a test's report: method, task, change of the held-out loss, elements; a table when the tests are over.
COMBINATION = "combination"
_COMBINATIONS: dict[tuple[str, str], tuple[str, int]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """By reports, which come from other processes too."""
    for name, value in report.user_properties:
        if name == COMBINATION:
            method, task, change, elements = value  # type: ignore[misc]
            _COMBINATIONS[method, task] = change, elements


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _COMBINATIONS:
        return
    methods, tasks = (sorted({key[i] for key in _COMBINATIONS}) for i in range(2))
    terminalreporter.section("change of the held-out loss over two rounds, every method on every task")
    terminalreporter.line(" " * 17 + " ".join(f"{task[:10]:>10}" for task in tasks) + "   elements")
    for method in methods:
        found = [_COMBINATIONS.get((method, task), ("", 0)) for task in tasks]
        terminalreporter.line(f"{method:17}" + " ".join(f"{loss:>10}" for loss, _ in found) + f"{found[0][1]:>11,}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    compiled = os.environ["TRITON_INTERPRET"] == "0" and torch.cuda.is_available()
    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="minutes long; run with -m slow"))
        if "gpu" in item.keywords and not compiled:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; run with TRITON_INTERPRET=0 and -m gpu"))


@pytest.fixture(params=sorted(_ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def llama() -> nn.Module:
    return make_model()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data, which is not part of this repository")
    return SHARED


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, list[str]], Path]:
    def write(name: str, lines: list[str]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return path

    return write
