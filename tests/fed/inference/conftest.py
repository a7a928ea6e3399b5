"""Small runs to try: of the embedded task, of prompts and answers, and of conversations."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.command import call
from helpers.free_text import make_chat_tokenizer, say
from helpers.models import make_model

SHORT = ("--rounds", 2, "--local-steps", 2, "--clients", 2, "--batch-size", 4, "--method", "random-mask")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inference")


def start(output: Path, *arguments: object) -> Path:
    """Makes a run in a directory."""
    result = call("run", *SHORT, *arguments, "--output", output)
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="session")
def classified(folder: Path) -> Path:
    """A run on the embedded task."""
    return start(folder / "classified", "--eval-examples", 40)


@pytest.fixture(scope="session")
def faq(folder: Path) -> Path:
    """A file of prompts and answers in the words of the embedded model."""
    rows = [
        {"prompt": f"the {thing} was {how} . my answer is", "completion": f" {answer}", "id": f"{thing} {how}"}
        for thing in ("film", "book", "meal", "hotel", "phone")
        for how, answer in (("dull", "no"), ("great", "yes"), ("lazy", "no"), ("fine", "yes"))
    ]
    path = folder / "faq.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def answered(folder: Path, faq: Path) -> Path:
    """A run of the embedded model on prompts and answers."""
    return start(folder / "answered", "--model", "embedded", "--data", faq, "--max-length", 24)


@pytest.fixture(scope="session")
def chat_model(folder: Path) -> Path:
    """A tiny model with one token per byte, 128 positions and a chat template. What it says depends on every token.

    With larger weights than at initialization, attention looks at few tokens. It says ASCII only.
    """
    model, tokenizer = make_model(vocabulary=272, positions=128), make_chat_tokenizer()
    for p in model.parameters():
        p.data *= 12 if p.dim() > 1 else 1
    said = [i for i in range(272) if len(text := tokenizer.decode([i])) == 1 and text.isascii() and text.isprintable()]
    unsaid = torch.ones(272, dtype=torch.bool).scatter_(0, torch.tensor(said), False)
    model.get_input_embeddings().weight.data[unsaid] *= 0.01  # type: ignore[operator]
    model.save_pretrained(folder / "chat-model")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "chat-model")
    return folder / "chat-model"


@pytest.fixture(scope="session")
def talked(folder: Path, chat_model: Path) -> Path:
    """A run on conversations."""
    rows = [{"messages": [say("user", f"{i}?"), say("assistant", f"{i}, no")]} for i in range(20)]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return start(folder / "talked", "--model", chat_model, "--data", folder / "talks.jsonl", "--density", 0.05,
                 "--lr", 3)  # fmt: skip


@pytest.fixture
def fails() -> Callable[..., str]:
    """Calls a command that ends with one line of error, and returns that."""

    def run(*arguments: object) -> str:
        result = call(*arguments)
        assert result.exit_code == 1, result.output
        lines = result.output.strip().splitlines()
        assert lines[-1].startswith("Error: "), result.output
        return lines[-1]

    return run
