"""Choosing, saving and checking masks."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from meerkat_engine import SparseMask
from meerkat_engine.engine import sensitivity
from meerkat_engine.engine.errors import MaskError
from meerkat_engine.engine.parameters import ParameterTable
from meerkat_engine.engine.sensitivity import select_largest

from helpers.losses import CALIBRATION_BATCHES, gradient_moments
from helpers.models import make_model


def test_from_gradients_selects_the_largest_mean_squares(architecture: str) -> None:
    model = make_model(architecture)
    squares, means = gradient_moments(model)
    mask = SparseMask.from_gradients(model, CALIBRATION_BATCHES, density=0.02)
    assert len(mask) == round(0.02 * squares.numel())
    assert mask.scores is not None
    assert mask.gradient is not None
    torch.testing.assert_close(mask.scores, squares[mask.ids], rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(mask.gradient, means[mask.ids], rtol=1e-3, atol=1e-7)
    left_out = squares.clone()
    left_out[mask.ids] = 0
    assert left_out.max() <= mask.scores.min() * 1.001


@pytest.mark.parametrize("sizes", [[10], [3, 1, 6], [1] * 10], ids=str)
@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
def test_ties_go_to_the_lower_id(sizes: list[int], k: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([1.0, 2, 2, 0, 2, 1, 2, 1, 0, 1])
    monkeypatch.setattr(sensitivity, "_PIECE", piece)
    ids, best = select_largest(values.split(sizes), k)
    order = sorted(range(10), key=lambda i: (-values[i].item(), i))
    assert ids.tolist() == sorted(order[:k])
    assert torch.equal(best, values[ids])


def test_magnitude_selects_the_largest_weights(llama: nn.Module) -> None:
    everything = torch.cat([p.detach().view(-1).abs() for p in llama.parameters()])
    mask = SparseMask.magnitude(llama, 0.01)
    assert set(mask.ids.tolist()) == set(torch.topk(everything, len(mask)).indices.tolist())


def test_tied_weights_count_once(llama: nn.Module) -> None:
    assert llama.lm_head.weight is llama.model.embed_tokens.weight  # type: ignore[union-attr]
    assert ParameterTable.of(llama).size == sum(p.numel() for p in llama.parameters())
    assert SparseMask.dense(llama).ids.tolist() == list(range(ParameterTable.of(llama).size))


@pytest.mark.parametrize("density", [1e-4, 0.3, 0.5, 0.9, 1.0])
def test_random_masks_have_the_requested_size_and_are_reproducible(llama: nn.Module, density: float) -> None:
    mask = SparseMask.random(llama, density, seed=5)
    assert len(mask) == max(1, round(density * mask.table.size))
    assert torch.equal(mask.ids, SparseMask.random(llama, density, seed=5).ids)
    if density < 1:
        assert not torch.equal(mask.ids, SparseMask.random(llama, density, seed=6).ids)


def test_random_masks_nest_and_are_uniform(llama: nn.Module) -> None:
    sparse, dense = (set(SparseMask.random(llama, u, seed=2).ids.tolist()) for u in (0.05, 0.4))
    assert sparse < dense
    size = ParameterTable.of(llama).size
    share = torch.tensor(sorted(dense)).div(size / 10).long().bincount(minlength=10) / len(dense)
    assert (share - 0.1).abs().max() < 0.02


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan")])
def test_a_density_out_of_range_is_rejected(llama: nn.Module, density: float) -> None:
    with pytest.raises(MaskError, match=r"density must be in \(0, 1\], got"):
        SparseMask.random(llama, density, seed=0)


def test_calibration_without_batches_is_rejected(llama: nn.Module) -> None:
    with pytest.raises(MaskError, match="no calibration batch"):
        SparseMask.from_gradients(llama, [])


def test_a_non_finite_calibration_loss_is_rejected(llama: nn.Module) -> None:
    llama.model.norm.weight.data[:] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(MaskError, match="calibration batch 0 is nan"):
        SparseMask.from_gradients(llama, CALIBRATION_BATCHES)
    assert all(p.grad is None for p in llama.parameters())


def test_save_and_load_give_the_same_mask(llama: nn.Module, tmp_path: Path) -> None:
    mask = SparseMask.from_gradients(llama, CALIBRATION_BATCHES, 0.01, calibration="three batches")
    mask.save(tmp_path / "m.safetensors")
    sent = SparseMask.from_bytes(mask.to_bytes(), llama)
    for loaded in (SparseMask.load(tmp_path / "m.safetensors", llama), sent):
        assert loaded.digest == mask.digest
        assert torch.equal(loaded.ids, mask.ids)
        for a, b in ((loaded.gradient, mask.gradient), (loaded.scores, mask.scores)):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)
        assert (loaded.density, loaded.source, loaded.calibration) == (0.01, "sensitivity", "three batches")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "meerkat-mask/2"
    assert metadata["d"] == str(mask.table.size)
    assert metadata["table_digest"] == mask.table.digest
    assert list(tmp_path.iterdir()) == [tmp_path / "m.safetensors"]


def test_a_mask_of_another_model_is_rejected_with_the_difference(llama: nn.Module, tmp_path: Path) -> None:
    mask, other = SparseMask.random(llama, 0.1, 0), make_model("qwen2")
    mask.save(tmp_path / "m")
    message = r"another model: parameter 'model\.layers\.0\.self_attn\.q_proj\.bias' .* is new"
    with pytest.raises(MaskError, match=message):
        SparseMask.load(tmp_path / "m", other)
    with pytest.raises(MaskError, match=message):
        SparseMask.from_bytes(mask.to_bytes(), other)


def test_damaged_masks_are_rejected(llama: nn.Module, tmp_path: Path) -> None:
    mask = SparseMask.random(llama, 0.1, 0)
    mask.save(tmp_path / "m")
    data = bytearray((tmp_path / "m").read_bytes())
    data[-9] ^= 1  # inside the ids
    (tmp_path / "flipped").write_bytes(data)
    (tmp_path / "short").write_bytes(data[:100])
    save_file({"ids": mask.ids}, tmp_path / "foreign")
    with pytest.raises(MaskError, match=r"damaged|ascend"):
        SparseMask.load(tmp_path / "flipped")
    with pytest.raises(MaskError, match="cannot read the mask"):
        SparseMask.load(tmp_path / "short")
    with pytest.raises(MaskError, match="is not of format meerkat-mask/2"):
        SparseMask.load(tmp_path / "foreign")
    with pytest.raises(MaskError, match="cannot read the mask"):
        SparseMask.load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([3, 3]), "position 1 holds 3 after 3"),
        (torch.tensor([5, 2]), "position 1 holds 2 after 5"),
        (torch.tensor([-1, 2]), "must be in"),
        (torch.tensor([1 << 40]), "must be in"),
        (torch.tensor([1.0]), "must be int64"),
        (torch.tensor([], dtype=torch.int64), "k > 0"),
    ],
    ids=["repeated", "unsorted", "negative", "too large", "float", "empty"],
)
def test_invalid_ids_are_rejected(llama: nn.Module, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        SparseMask(ids=ids, table=ParameterTable.of(llama), density=0.1, source="test")
