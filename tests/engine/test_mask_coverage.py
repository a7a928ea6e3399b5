"""Share of a task's squared gradient in a mask, and its concentration on few elements."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from meerkat_engine import SparseMask
from meerkat_engine.engine.errors import MaskError
from meerkat_engine.engine.mask_coverage import concentration, measure_coverage
from meerkat_engine.engine.sensitivity import Sensitivity, accumulate_gradients


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 3))


@pytest.fixture
def batches(generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(4, 20, generator=generator) for _ in range(3)]


def test_coverage_is_the_share_of_the_squared_gradient(model: nn.Module, batches: list[Tensor]) -> None:
    squares = (
        torch.cat([s.view(-1) for s in accumulate_gradients(model, batches, loss).squares.values()]).double().numpy()
    )
    masks = [SparseMask.random(model, 0.1, 3), SparseMask.magnitude(model, 0.05)]
    best = [np.argsort(-squares, kind="stable")[: len(mask)] for mask in masks]
    for mask, best_ids, coverage in zip(masks, best, measure_coverage(masks, model, batches, loss), strict=True):
        ids = mask.ids.numpy()
        assert coverage.captured == pytest.approx(squares[ids].sum() / squares.sum(), rel=1e-6)
        assert coverage.best == pytest.approx(squares[best_ids].sum() / squares.sum(), rel=1e-6)
        assert coverage.overlap == pytest.approx(np.isin(ids, best_ids).mean())
        assert coverage.chance == len(ids) / squares.size
        assert coverage.captured < coverage.best


def test_the_tasks_own_mask_is_the_best_one(model: nn.Module, batches: list[Tensor]) -> None:
    task_mask = SparseMask.from_gradients(model, batches, 0.1, loss=loss)
    coverage = measure_coverage([task_mask, SparseMask.dense(model)], model, batches, loss)
    assert coverage[0].captured == coverage[0].best
    assert coverage[0].overlap == coverage[1].overlap == 1.0
    assert coverage[1].captured == pytest.approx(1.0)


def test_a_mask_of_another_model_is_rejected(model: nn.Module, batches: list[Tensor]) -> None:
    mask = SparseMask.random(nn.Linear(4, 4), 0.5, 1)
    with pytest.raises(MaskError, match="another model"):
        measure_coverage([mask], model, batches, loss)


def test_concentration_is_a_ratio_of_means() -> None:
    values = torch.tensor([1.0] * 890 + [2.0] * 90 + [50.0] * 10 + [0.0] * 10)
    shuffled = values[torch.randperm(1000, generator=torch.Generator().manual_seed(2))]
    gradients = Sensitivity({"a": shuffled[:400].view(20, 20), "b": shuffled[400:]}, {}, 1)
    assert concentration(gradients, 0.01, 0.1) == pytest.approx(25.0)
    with pytest.raises(ValueError, match="leave none between them"):
        concentration(replace(gradients, squares={"a": shuffled[:5]}), 0.1, 0.2)
