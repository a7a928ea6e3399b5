"""A SuperLink with three authenticated SuperNodes, shared by the tests of a module."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.deployment import Deployment, deployment

with warnings.catch_warnings():  # imports Flower once without its warnings about its own dependencies
    warnings.simplefilter("ignore")
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("flower", numbered=True)
    with deployment(directory) as running:
        running.three_nodes()
        yield running


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return tmp_path / "flower"


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
