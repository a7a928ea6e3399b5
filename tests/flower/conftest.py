"""One SuperLink with three authenticated SuperNodes, for all tests of a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .deployment import Deployment, deployment


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("flower", numbered=True)
    with deployment(directory) as found:
        found.three_nodes()
        yield found


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
