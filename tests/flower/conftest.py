"""One SuperLink with three authenticated SuperNodes, for all tests of a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .deployment import Deployment, deployment, make_keys, wait_until


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("flower", numbered=True)
    with deployment(directory) as found:
        for i in range(3):
            key = make_keys(directory, f"key{i}")
            found.register(key)
            found.node(f"node{i}", key, f"client-id={i}")
        for i in range(3):
            name = f"node{i}"
            wait_until(lambda name=name: "SuperNode ID" in found.log(name), 60, f"{name} is there")
        yield found


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
