"""Deltas: the resulting bits, rejected models, and damaged files."""

import builtins
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine.delta import _KIND, Delta
from meerkat_engine.engine.errors import DeltaError
from meerkat_engine.engine.lm.text_loss import language_model_loss
from meerkat_engine.engine.parameters import ParameterTable, fingerprint
from meerkat_engine.engine.weights import MaskedWeights

from helpers.constants import DTYPES, FUZZ
from helpers.damage import (
    BYTE_CHANGES,
    assert_changed_bytes_are_rejected,
    header_size,
    is_rejected,
    rewrite,
    with_damaged_byte,
)
from helpers.losses import BATCH
from helpers.models import make_model
from helpers.tensors import same_bits


def trained(dtype: torch.dtype, architecture: str = "llama", steps: int = 3) -> tuple[nn.Module, Delta]:
    """Trains a model for some steps; returns it and its delta."""
    model = make_model(architecture, dtype)
    base = fingerprint(model)
    opt = SparseZO(model, SparseMask.random(model, 0.05, 1), lr=0.02, eps=1e-2, seed=3)
    start = opt.weights.masters()
    for _ in range(steps):
        opt.step(lambda: language_model_loss(model, BATCH))
    return model, Delta.of(model, opt.weights, base=base, start=start, method="three steps", round=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_applying_a_delta_restores_the_bits(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, delta = trained(dtype, architecture)
    delta.save(tmp_path / "d")
    loaded = Delta.load(tmp_path / "d")
    assert same_bits(loaded.masters, delta.masters)
    assert (loaded.method, loaded.round, loaded.dtype) == ("three steps", 2, str(dtype).removeprefix("torch."))
    base = make_model(architecture, dtype)
    assert fingerprint(base) != fingerprint(model)
    loaded.apply(base)
    assert fingerprint(base) == fingerprint(model)
    assert all(same_bits(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))


def test_masters_keep_more_precision_than_the_dtype(tmp_path: Path) -> None:
    """Training resumes from the fp32 masters, not from the rounded weights."""
    _, delta = trained(torch.bfloat16)
    delta.save(tmp_path / "d")
    masters = Delta.load(tmp_path / "d").masters
    assert (masters != masters.bfloat16().float()).sum() > len(masters) // 2


def unchanged_check(model: nn.Module) -> Callable[[], bool]:
    before = fingerprint(model)
    return lambda: fingerprint(model) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_models_are_rejected_and_unchanged(dtype: torch.dtype, tmp_path: Path) -> None:
    after, delta = trained(dtype)
    delta.save(tmp_path / "d")
    loaded = Delta.load(tmp_path / "d")
    other = torch.float32 if dtype is not torch.float32 else torch.float16
    differing = make_model("llama", dtype)
    differing.model.norm.weight.data[3] += 1  # type: ignore[union-attr]
    for model, message in (
        (make_model("opt", dtype), "was made for another model: parameter"),
        (make_model("llama", dtype, vocabulary=97), r"'model\.embed_tokens\.weight' has shape \(97, 32\)"),
        (make_model("llama", other), f"of dtype {delta.dtype} with fingerprint {delta.base[:12]}; this model has"),
        (differing, "this model has fingerprint"),
        (after, f"this model has fingerprint {delta.weights[:12]}"),
    ):
        is_unchanged = unchanged_check(model)
        with pytest.raises(DeltaError, match=message) as caught:
            loaded.apply(model)
        assert str(tmp_path / "d") in str(caught.value)
        assert is_unchanged()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_final_fingerprint_is_rolled_back(dtype: torch.dtype, tmp_path: Path) -> None:
    _, delta = trained(dtype)
    delta.save(tmp_path / "d")
    rewrite(tmp_path / "d", tmp_path / "wrong", _KIND, lambda _, tensors: tensors["masters"][5].add_(1))
    model = make_model("llama", dtype)
    is_unchanged = unchanged_check(model)
    with pytest.raises(DeltaError, match=r"wrong' should give weights .*; nothing was changed"):
        Delta.load(tmp_path / "wrong").apply(model)
    assert is_unchanged()


def test_parameters_that_share_memory_are_rejected(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(4))
            self.b = nn.Parameter(torch.zeros(4))

    apart = Twice()
    weights = MaskedWeights(apart, SparseMask.dense(apart))
    delta = Delta.of(apart, weights, base=fingerprint(apart), start=weights.masters())
    shared = Twice()
    shared.b.data = shared.a.data
    with pytest.raises(DeltaError, match=r"cannot be applied: .* share memory"):
        delta.apply(shared)


class Mixed(nn.Module):
    """Trainable float weights, int8 weights, and the buffers of batch normalization."""

    def __init__(self, int8: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))
        self.int8 = nn.Parameter(torch.full((6, 6), int8, dtype=torch.int8), requires_grad=False)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(x @ self.weight @ self.int8.float())
        return normed


def mixed_delta(*, training: bool, int8: int = 3) -> tuple[Mixed, Delta]:
    """Trains a mixed model, with batch normalization in training or in evaluation mode."""
    model = Mixed(int8).train(training)
    base, x = fingerprint(model), torch.arange(24.0).view(4, 6) / 24
    opt = SparseZO(model, SparseMask.random(model, 0.2, 1), lr=0.01)
    start = opt.weights.masters()
    opt.step(lambda: model(x).square().mean())
    return model, Delta.of(model, opt.weights, base=base, start=start)


def test_a_base_with_other_buffers_or_int8_weights_is_rejected() -> None:
    trained_model, delta = mixed_delta(training=False)
    base = Mixed().eval()
    delta.apply(base)
    assert fingerprint(base) == fingerprint(trained_model)
    moved = Mixed()
    moved.norm.running_mean[2] += 1  # type: ignore[index]
    for model, kinds in ((Mixed(int8=4), "other parameters"), (moved, "buffers")):
        is_unchanged = unchanged_check(model)
        with pytest.raises(DeltaError, match=rf"this model has fingerprint \w+ \(other {kinds}\)$"):
            delta.apply(model.eval())
        assert is_unchanged()


@pytest.mark.filterwarnings("ignore:the model is in training mode")
def test_no_delta_is_made_that_would_lose_moved_buffers() -> None:
    with pytest.raises(DeltaError, match="a delta would lose what else was changed"):
        mixed_delta(training=True)


@pytest.mark.parametrize(
    ("density", "message"),
    [(1.0, "masked weights were changed without the optimizer"), (0.2, "would lose what else was changed")],
)
def test_no_delta_is_made_of_weights_changed_without_the_optimizer(density: float, message: str) -> None:
    model = Mixed().eval()
    weights = MaskedWeights(model, SparseMask.random(model, density, 1))
    base, start = fingerprint(model), weights.masters()
    nn.init.constant_(model.weight, 2.0)
    with pytest.raises(DeltaError, match=message):
        Delta.of(model, weights, base=base, start=start)


def small_delta() -> Delta:
    model = nn.Linear(3, 2)
    mask = SparseMask(ids=torch.tensor([0, 3, 7]), table=ParameterTable.of(model), density=0.375, source="delta")
    return Delta(
        mask=mask, masters=torch.tensor([0.5, -0.0, 3.0]), base="0" * 64, base_by_kind={"buffers": "2" * 64},
        weights="1" * 64, dtype="float32", method="a test", round=7,
    )  # fmt: skip


def contents(delta: Delta) -> tuple[object, ...]:
    plain = (delta.base, delta.base_by_kind, delta.weights, delta.dtype, delta.method, delta.round, delta.mask.table)
    return (*plain, delta.mask.ids.tolist(), delta.masters.view(torch.int32).tolist())


def delta_is_rejected(path: Path, original: Delta) -> bool:
    return is_rejected(path, Delta.load, DeltaError, lambda loaded: contents(loaded) == contents(original))


def test_a_changed_byte_is_rejected_or_has_no_effect(tmp_path: Path) -> None:
    delta, path = small_delta(), tmp_path / "d"
    delta.save(path)
    data = path.read_bytes()
    assert_changed_bytes_are_rejected(path, lambda: delta_is_rejected(path, delta), BYTE_CHANGES[::2])
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert delta_is_rejected(path, delta)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Delta, bytes, Path]:
    path = tmp_path_factory.mktemp("deltas") / "d"
    _, delta = trained(torch.float32)
    delta.save(path)
    return delta, path.read_bytes(), path


@settings(max_examples=300 * FUZZ, deadline=None)
@given(data=st.data())
def test_random_damage_of_a_larger_delta_is_rejected(larger: tuple[Delta, bytes, Path], data: st.DataObject) -> None:
    delta, good, path = larger
    damaged, position = with_damaged_byte(data, good)
    path.write_bytes(damaged)
    assert delta_is_rejected(path, delta) or position < header_size(good)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round": "-1"}, "the round must be 0 or more, got -1"),
        ({"round": "two"}, "invalid literal"),
        ({"mask": "0" * 64}, "its mask does not match its ids and table"),
        ({"table_digest": "0" * 64}, "its table_digest does not match its ids and table"),
        ({"table": "[]"}, "density must be in|must be in"),
        ({"base_by_kind": "[1]"}, "is damaged: "),
        ({"base_by_kind": "7"}, "is damaged: "),
        ({"extra": "1"}, "unknown 'extra' in its metadata"),
    ],
    ids=str,
)
def test_invalid_content_with_a_valid_checksum_is_rejected(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    small_delta().save(tmp_path / "good")
    rewrite(tmp_path / "good", tmp_path / "d", _KIND, lambda metadata, _: metadata.update(changes))
    with pytest.raises(DeltaError, match=message) as caught:
        Delta.load(tmp_path / "d")
    assert str(tmp_path / "d") in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_masters_are_rejected(tmp_path: Path, value: float) -> None:
    small_delta().save(tmp_path / "good")
    rewrite(tmp_path / "good", tmp_path / "d", _KIND, lambda _, tensors: tensors["masters"][1].fill_(value))
    with pytest.raises(DeltaError, match=r"masters must be finite; position 1 holds"):
        Delta.load(tmp_path / "d")
    with pytest.raises(DeltaError, match=r"masters must be float32 \[3\], got torch.float32 \[2\]"):
        Delta(mask=small_delta().mask, masters=torch.zeros(2), base="", base_by_kind={}, weights="", dtype="float32")


def test_paths_in_a_file_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every string in the file is the path of a FIFO, which would block any process that opens it."""
    trap = tmp_path / "trap"
    os.mkfifo(trap)
    small_delta().save(tmp_path / "good")
    free = dict.fromkeys(("base", "weights", "method", "dtype"), str(trap))
    rewrite(tmp_path / "good", tmp_path / "d", _KIND, lambda metadata, _: metadata.update(free))
    opened: list[str] = []
    real_open, real_os_open = builtins.open, os.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: (opened.append(str(file)), real_open(file, *a, **k))[1])
    monkeypatch.setattr(os, "open", lambda file, *a, **k: (opened.append(str(file)), real_os_open(file, *a, **k))[1])
    loaded = Delta.load(tmp_path / "d")
    model = nn.Linear(3, 2)
    with pytest.raises(DeltaError, match="with fingerprint"):
        loaded.apply(model)
    assert loaded.method == str(trap)
    assert not [name for name in opened if str(trap) in name]
