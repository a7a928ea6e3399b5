"""A run frees its memory when it ends, before Python looks for cycles: several runs in one process need that of one."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.fed import execute, make_config
from meerkat_engine.fed.setup import server_and_clients

SMALL: dict[str, Any] = {
    "rounds": 1, "local_steps": 1, "clients": 2, "batch_size": 4, "calibration_texts": 16, "eval_examples": 20,
    "vp_steps": 8, "vp_initial": 3, "vp_later": 4, "vp_null_paths": 3,
}  # fmt: skip


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("method", ["meerkat", "meerkat-vp", "full-fedzo", "fedavg", "decomfl"])
def test_a_run_leaves_no_replica_behind(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    right = server_and_clients.Replica

    def record(*arguments: Any) -> Any:
        replica = right(*arguments)
        made.extend([weakref.ref(replica), weakref.ref(replica.optimizer.weights)])
        return replica

    monkeypatch.setattr(server_and_clients, "Replica", record)
    execute(make_config({**SMALL, "method": method}), tmp_path / "r", lambda _: None, lambda _: None)
    assert len(made) == 2
    assert [ref() for ref in made] == [None, None]


def test_an_optimizer_is_freed_with_its_last_reference() -> None:
    def make() -> tuple[nn.Module, SparseZO]:
        model = nn.Linear(8, 8)
        return model, SparseZO(model, SparseMask.random(model, 0.5, seed=1), lr=0.1, seed=1)

    make()  # the first optimizer of a process makes torch load code, which keeps frames
    gc.collect()
    gc.disable()
    try:
        model, optimizer = make()
        optimizer.step(lambda: model.weight.square().sum())
        refs = [weakref.ref(optimizer), weakref.ref(optimizer.weights)]
        del optimizer
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()
