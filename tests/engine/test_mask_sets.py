"""Sparser masks of a mask, and unions of masks."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask
from meerkat_engine.engine.errors import MaskError
from meerkat_engine.engine.mask_sets import sparser, united
from meerkat_engine.engine.parameters import ParameterTable

from helpers.losses import CALIBRATION_BATCHES
from helpers.models import make_model

TABLE = ParameterTable.of(nn.Linear(9, 10))  # 100 elements


def mask_of(scores: dict[int, float], table: ParameterTable = TABLE) -> SparseMask:
    """A mask of the given elements and scores, chosen from all elements of the model."""
    ids = torch.tensor(sorted(scores))
    values = torch.tensor([scores[i] for i in sorted(scores)])
    return SparseMask(
        ids=ids, table=table, density=len(scores) / table.size, source="task", calibration="texts", scores=values
    )


@pytest.mark.parametrize("density", [1e-5, 0.001, 0.004, 0.03, 0.05])
def test_a_sparser_mask_is_the_one_chosen_at_that_density(llama: nn.Module, density: float) -> None:
    dense, chosen = (SparseMask.from_gradients(llama, CALIBRATION_BATCHES, u) for u in (0.05, density))
    result = sparser(dense, density)
    assert result.digest == chosen.digest
    assert torch.equal(result.scores, chosen.scores)  # type: ignore[arg-type]
    assert torch.equal(result.gradient, chosen.gradient)  # type: ignore[arg-type]
    assert (result.density, result.source) == (density, "sensitivity")


def test_ties_in_a_sparser_mask_go_to_the_lower_id() -> None:
    mask = mask_of({3: 1.0, 5: 2.0, 20: 1.0, 21: 1.0, 60: 2.0})
    assert [sparser(mask, k / 100).ids.tolist() for k in (1, 2, 3, 4)] == [[5], [5, 60], [3, 5, 60], [3, 5, 20, 60]]


def test_there_is_no_sparser_mask_without_scores_or_of_a_larger_density(llama: nn.Module) -> None:
    with pytest.raises(MaskError, match=r"the mask \(random, seed 1\) has no scores"):
        sparser(SparseMask.random(llama, 0.1, 1), 0.01)
    with pytest.raises(MaskError, match=r"a mask of density 0\.02 has no sparser one of density 0\.03"):
        sparser(mask_of({1: 1.0, 2: 1.0}), 0.03)
    with pytest.raises(MaskError, match="density must be in"):
        sparser(mask_of({1: 1.0}), 0)


def test_a_union_has_the_elements_of_all_masks() -> None:
    union = united([mask_of({1: 9.0, 4: 1.0}), mask_of({4: 1.0, 90: 5.0}), mask_of({2: 1.0})])
    assert union.ids.tolist() == [1, 2, 4, 90]
    assert (union.density, union.source, union.calibration) == (0.04, "union of 3, task", "texts")
    assert union.scores is None
    assert union.gradient is None


def test_a_cut_union_takes_the_elements_of_the_most_masks_then_the_best_ranked() -> None:
    masks = [
        mask_of({10: 3.0, 11: 2.0, 12: 1.0}),  # ranks 0, 1, 2
        mask_of({12: 3000.0, 20: 2000.0, 11: 1000.0}),  # ranks 0, 1, 2, on another scale
        mask_of({30: 1.0, 11: 0.5, 5: 0.5}),  # ranks 0, 2, 1: the lower of two ids with one score comes first
    ]
    order = [11, 12, 10, 30, 5, 20]  # of three masks; of two; of one, with rank 0, 0, 1, 1
    for k in range(1, 7):
        assert united(masks, k / 100).ids.tolist() == sorted(order[:k])
        assert united(masks[::-1], k / 100).digest == united(masks, k / 100).digest
    assert united(masks, 0.5).ids.tolist() == united(masks).ids.tolist() == sorted(order)


def test_a_cut_union_agrees_with_a_plain_computation(generator: torch.Generator) -> None:
    """Random masks of different sizes with many ties."""
    scores = [torch.randint(0, 4, (100,), generator=generator).float() for _ in range(5)]
    chosen = [torch.randperm(100, generator=generator)[: 20 + 5 * i].tolist() for i in range(5)]
    masks = [mask_of({i: float(of[i]) for i in ids}) for of, ids in zip(scores, chosen, strict=True)]
    votes, ranks = Counter[int](), Counter[int]()
    for of, ids in zip(scores, chosen, strict=True):
        for rank, i in enumerate(sorted(ids, key=lambda i: (-of[i].item(), i))):
            votes[i] += 1
            ranks[i] += rank
    order = sorted(votes, key=lambda i: (-votes[i], ranks[i], i))
    for k in (1, 7, 30, 60):
        assert united(masks, k / 100).ids.tolist() == sorted(order[:k])


def test_masks_that_have_no_union_are_refused() -> None:
    mask = mask_of({1: 1.0})
    with pytest.raises(MaskError, match="at least one mask"):
        united([])
    with pytest.raises(MaskError, match="masks 1 and 3 were made for different models: "):
        united([mask, mask, mask_of({1: 1.0}, ParameterTable.of(make_model("llama")))])
    with pytest.raises(MaskError, match="has no scores"):
        united([mask, replace(mask, scores=None)], 0.01)
    assert united([mask, replace(mask, scores=None)]).ids.tolist() == [1]
    with pytest.raises(MaskError, match="density must be in"):
        united([mask], 1.5)
