"""Shared fixtures. The kernels run in Triton's interpreter, which must be enabled before they are imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # 0 on a GPU: see the tests marked gpu
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.constants import COMBINATION
from helpers.models import ARCHITECTURES, make_model

# A second thread does not speed up tiny models, and slows them down much if two processes share two cores.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# (method, task) -> (change of the held-out loss, number of masked elements)
_COMBINATIONS: dict[tuple[str, str], tuple[str, int]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collects results from the tests' reports, because tests may run in other processes."""
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
        results = [_COMBINATIONS.get((method, task), ("", 0)) for task in tasks]
        losses = " ".join(f"{loss:>10}" for loss, _ in results)
        terminalreporter.line(f"{method:17}{losses}{results[0][1]:>11,}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    compiled = os.environ["TRITON_INTERPRET"] == "0" and torch.cuda.is_available()
    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))
        if "gpu" in item.keywords and not compiled:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; run with TRITON_INTERPRET=0 and -m gpu"))


@pytest.fixture(params=sorted(ARCHITECTURES))
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
